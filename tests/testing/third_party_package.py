"""A package of somebody else, as a test writes it: two methods, one of which breaks the contract on resuming."""

from pathlib import Path

from lightning_stable.testing.documents import HEADINGS

METHODS = """
from lightning_stable.registry import Method

METHODS = (
    Method("halving", "callback", "demo_plugin.halving.Halving", "", "Scales the gradients of each step"),
    Method("forgetful", "callback", "demo_plugin.halving.Forgetful", "", "Scales them less from step to step"),
)
"""

HALVING = """
from lightning.pytorch import Callback


class Halving(Callback):
    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def share(self) -> float:
        return self.factor

    def on_fit_start(self, trainer, pl_module) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(f"{type(self).__name__} does not work with manual optimisation.")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        share = self.share()
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(share)


class Forgetful(Halving):
    count = 0

    def setup(self, trainer, pl_module, stage) -> None:
        self.count = 0

    def share(self) -> float:
        self.count += 1
        return self.factor ** (1 / self.count)
"""

SETTINGS = """
from demo_plugin.halving import Forgetful, Halving
from lightning_stable.testing import STEPS, Settings, Stream, assert_same, fit


def halves(run, plugin):
    # The first step is at the weights of a run without it.
    plain = fit([], validation=Stream(2, seed=5), max_steps=STEPS, precision=run.trainer.precision)
    expected = {name: 0.5 * gradient for name, gradient in plain.steps[0].gradients.items()}
    assert_same(run.steps[0].gradients, expected, "the gradients of the first step", 1e-6)


def nothing(run, plugin):
    assert len(run.steps) == STEPS


MANUAL = {name: "does not work with manual" for name in ("manual", "two optimizers")}
SETTINGS = {
    "halving": Settings(
        make=lambda: Halving(0.5), oracle=halves, identities=(lambda: Halving(1.0),), refused_modules=MANUAL
    ),
    "forgetful": Settings(
        make=lambda: Forgetful(0.5),
        oracle=nothing,
        identities=(),
        refused_modules=MANUAL,
        expected_failures={"inert": "It is a test of the contracts."},
    ),
}
"""

TESTS = """
from demo_plugin.contracts import SETTINGS

from lightning_stable.testing import contract_suite

TestContracts = contract_suite(SETTINGS, company=("ema", "simulated"))
"""

FURTHER = """
import inspect
from importlib.metadata import entry_points

from lightning.fabric.utilities import registry
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.utilities import signature_utils


def test_the_host_is_as_it_was_before_the_contracts():
    assert signature_utils.inspect is inspect
    assert registry.entry_points is entry_points
    assert result._ResultMetric.to.__code__.co_filename == result.__file__
"""

INI = """
[pytest]
addopts = -p lightning_stable.testing.plugin -p no:cacheprovider -q --strict-config --strict-markers
lightning_stable_settings = demo_plugin.contracts:SETTINGS
filterwarnings = error
"""

ADDON = """# Scales the gradients of each step
trainer:
  callbacks+:
    - class_path: demo_plugin.halving.Halving
      init_args:
        factor: 0.25
"""


def write_package(folder: Path) -> Path:
    """Write the package as if it were installed, and its tests; return what goes onto the path."""
    site = folder / "site"
    package, info, tests = site / "demo_plugin", site / "demo_plugin-0.1.dist-info", folder / "tests"
    card = "# Halving\n" + "".join(f"## {heading}\n" for heading in HEADINGS) + "`factor`\n```python\nx = 1\n```\n"
    files = {
        package / "__init__.py": "",
        package / "methods.py": METHODS,
        package / "halving.py": HALVING,
        package / "contracts.py": SETTINGS,
        package / "cards" / "halving.md": card,
        package / "templates" / "addons" / "halving.yaml": ADDON,
        info / "METADATA": "Metadata-Version: 2.1\nName: demo-plugin\nVersion: 0.1\n",
        info / "entry_points.txt": "[lightning_stable.methods]\ndemo = demo_plugin.methods:METHODS\n",
        tests / "test_demo.py": TESTS,
        tests / "test_further.py": FURTHER,
        folder / "pytest.ini": INI,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return site
