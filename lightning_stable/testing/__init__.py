"""The contract suite, for plugins of other packages: what each of ours keeps, tested on yours.

``tests/conftest.py`` of such a package::

    pytest_plugins = ["lightning_stable.testing.plugin"]

and its ``tests/test_contracts.py``, with a row for each method that it adds by the entry-point group
``lightning_stable.methods``::

    from my_plugin import MyPlugin

    from lightning_stable.testing import Settings, contract_suite


    def halved(run, plugin):
        for step in run.steps:
            assert step.rates == [rate / 2 for rate in run.module.rates]


    TestContracts = contract_suite(
        {"my_plugin": Settings(make=lambda: MyPlugin(0.5), oracle=halved, identities=(lambda: MyPlugin(1.0),))}
    )

An oracle is given the run and the plugin, and may fit again to compare (:func:`fit`, :class:`Stream`). Where one of the
contracts cannot hold, the row says why by ``expected_failures``; what the plugin refuses, by ``refused_modules`` and
``conflicts``. ``pytest --capabilities FILE`` writes what was found; see :mod:`lightning_stable.testing.plugin`.

Public is what this module exports, and the plugin; the files beside it may change. Nothing heavy is imported until a
name is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_stable.testing.harness import MemoryLogger, Run, assert_same, fit
    from lightning_stable.testing.modules import Net, Step
    from lightning_stable.testing.rows import STEPS, PeftSettings, PrecisionSettings, Settings, StrategySettings
    from lightning_stable.testing.streams import Stream
    from lightning_stable.testing.third_party import contract_suite

__all__ = [
    "STEPS",
    "MemoryLogger",
    "Net",
    "PeftSettings",
    "PrecisionSettings",
    "Run",
    "Settings",
    "Step",
    "StrategySettings",
    "Stream",
    "assert_same",
    "contract_suite",
    "fit",
]

_HOMES = {
    "harness": ("MemoryLogger", "Run", "assert_same", "fit"),
    "modules": ("Net", "Step"),
    "rows": ("STEPS", "PeftSettings", "PrecisionSettings", "Settings", "StrategySettings"),
    "streams": ("Stream",),
    "third_party": ("contract_suite",),
}


def __getattr__(name: str) -> Any:
    """Import a name on first use (PEP 562)."""
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lightning_stable.testing.{home}"), name)
    raise AttributeError(f"module 'lightning_stable.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion finds them."""
    return sorted({*globals(), *__all__})
