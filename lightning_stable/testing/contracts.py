"""The eleven contracts, each a function over one row that raises ``AssertionError`` where the plugin breaks it.

They know no method by name: what differs between methods is in its row. Resuming, failures and reuse are in
``recovery.py``, the templates and the card in ``documents.py``; all are called from here.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stable.testing.documents import HEADINGS, check_card, check_yaml
from lightning_stable.testing.feeding import is_metric, without_metric
from lightning_stable.testing.harness import MODULES, Net, SaveAt, Stream, assert_same, differences, fit, once
from lightning_stable.testing.modules import prepared_by
from lightning_stable.testing.recovery import (
    FAILURES,
    MOMENTS,
    check_exception,
    check_failing_test,
    check_leftovers,
    check_resume,
    check_reuse,
    is_finite,
)
from lightning_stable.testing.rows import CUT, STEPS, Row, Settings, StrategySettings, found_by, on_top_of, preparation
from lightning_stable.testing.workers import Pair, processes

__all__ = [
    "CUT",
    "FAILURES",
    "HEADINGS",
    "MOMENTS",
    "PRECISIONS",
    "STEPS",
    "Row",
    "Settings",
    "check_any_module",
    "check_card",
    "check_company",
    "check_exception",
    "check_failing_test",
    "check_inert",
    "check_leftovers",
    "check_oracle",
    "check_precision_company",
    "check_resume",
    "check_reuse",
    "check_safe_load",
    "check_two_processes",
    "check_yaml",
    "two_process_job",
]

# ---------------------------------------------------------------------------------------------------- 3


def check_inert(row: Row, tmp_path: Path) -> None:
    """At each identity setting the plugin changes no bit of the trajectory: weights, rates, random numbers, logs.

    A strategy of two processes, which adds up in an order of its own, may be as far from the host's as its row says.
    """
    assert row.settings.identities, f"{row.name} states no identity setting"

    def run(plugins: list[Any]) -> dict[str, Any]:
        torch.manual_seed(3)
        # Each strategy does with the batch statistics of several processes what it thinks best.
        module = Net(dropout=0.3, norm=processes() == 1)
        done = fit(plugins, module=module, validation=Stream(2, seed=5), max_steps=STEPS, val_check_interval=3)
        names = {name for _, entry in plain_logs for name in entry} if plain_logs else None
        logged = [
            (step, {name: value for name, value in entry.items() if names is None or name in names})
            for step, entry in done.logged
        ]
        return {
            **done.snapshot(),
            "plugins": None,
            "logged": [entry for entry in logged if entry[1]],
            "steps": [step._asdict() for step in done.steps],
            "random": torch.rand(3),
        }

    plain_logs: list[tuple[int, dict[str, float]]] = []
    without = once(check_inert, "nothing at all", lambda: run([]))
    plain_logs = without["logged"]
    tolerance = row.settings.tolerance if isinstance(row.settings, StrategySettings) and processes() > 1 else 0.0
    for number, identity in enumerate(row.settings.identities):
        what = f"{row.name} at its identity against nothing at all (number {number})"
        assert_same(run([identity()]), without, what, tolerance)


# ---------------------------------------------------------------------------------------------------- 4


def two_process_job(find: Callable[[], Row]) -> dict[str, Any]:
    """Run in each of two processes: fit under DDP and return what the ranks have to agree in."""
    # Apart from the other rank, and from where the processes were started.
    os.chdir(tempfile.mkdtemp())
    row = find()
    with prepared_by(preparation(row)):
        module = Net(norm=False)
    run = fit(
        [row.settings.make()],
        module=module,
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        val_check_interval=4,
        devices=2,
        strategy="ddp",
    )
    return {**run.snapshot(), "steps": [step._asdict() for step in run.steps]}


def check_two_processes(row: Row, workers: Pair) -> None:
    """Two gloo processes end bit-equal, and equal to one process that sees the same samples (or the row's twin)."""
    first, second = workers.run("lightning_stable.testing.contracts:two_process_job", find=found_by(row))
    shared = ("weights", "optimizers", "plugins", "steps")
    assert_same([second[key] for key in shared], [first[key] for key in shared], "rank 1 against rank 0")
    single = fit(
        [(row.settings.twin or row.settings.make)()],
        module=Net(norm=False),
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        val_check_interval=4,
    )
    expected = {**single.snapshot(), "steps": [step._asdict() for step in single.steps]}
    # A metric may keep its scores as bytes, which no tolerance compares; what it says of them is logged.
    alike = [key for key in (*shared, "logged") if key != "plugins" or not is_metric(single.plugins[0])]
    assert_same(
        [first[key] for key in alike],
        [expected[key] for key in alike],
        "two processes against one",
        tolerance=2e-4,
    )


# ---------------------------------------------------------------------------------------------------- 5


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
}
"""The settings of a Trainer under which an oracle recomputes what the plugin did."""


def check_oracle(row: Row, how: str, tmp_path: Path) -> None:
    """Under accumulation, clipping and bf16-mixed the plugin does what its oracle says, for every optimizer step."""
    row, settings = on_top_of(row, PRECISIONS[how])
    plugin = row.settings.make()
    run = fit([plugin], validation=Stream(2, seed=5), max_steps=STEPS, check_val_every_n_epoch=1, **settings)
    assert len(run.steps) == STEPS
    row.settings.oracle(run, plugin)


# ---------------------------------------------------------------------------------------------------- 8


def check_any_module(row: Row, kind: str, tmp_path: Path) -> None:
    """The plugin has its effect on this kind of module, or says clearly that it does not work with it."""

    def run(plugins: list[Any]) -> tuple[dict[str, Any], set[str]]:
        torch.manual_seed(3)
        case = MODULES[kind]()
        before = copy.deepcopy(without_metric(case.module))
        done = fit(
            plugins,
            module=case.module,
            train=case.train,
            validation=case.validation,
            own_loaders=case.train is None,
            limit_val_batches=2,
            # The host counts the steps of all optimizers.
            max_steps=STEPS * (2 if kind == "two optimizers" else 1),
        )
        ended = without_metric(case.module)
        assert differences(ended, before), "the module did not train"
        assert is_finite(case.module), "weights are not finite"
        return ended, {name for _, entry in done.logged for name in entry}

    if kind in row.settings.refused_modules:
        with pytest.raises(ValueError, match=row.settings.refused_modules[kind]) as caught:
            run([row.settings.make()])
        assert row.class_name in str(caught.value), f"the error does not name {row.class_name}: {caught.value}"
        return
    ended, logged = run([row.settings.make()])
    plain, usual = once(MODULES, kind, lambda: run([]))
    if row.settings.observer:
        assert_same(ended, plain, f"{row.name}, which only reports, against nothing at all")
        assert logged - usual, f"{row.name} reported nothing: only {sorted(usual)} were logged, as without it"
    else:
        assert differences(ended, plain), f"{row.name} had no effect: the module ends as it does without it"


# ---------------------------------------------------------------------------------------------------- 9


def check_safe_load(row: Row, tmp_path: Path) -> None:
    """Its checkpoint loads with ``weights_only=True`` and nothing allowed beside, in the middle and after the end."""
    path = tmp_path / "safe.ckpt"
    plugin = row.settings.make()
    run = fit([plugin, SaveAt(CUT, str(path))], validation=Stream(2, seed=5), max_steps=STEPS)
    end = tmp_path / "end.ckpt"
    run.trainer.save_checkpoint(end)
    allowed = torch.serialization.get_safe_globals()
    for saved in (path, end):
        checkpoint = torch.load(saved, weights_only=True)
        # A metric's state is in the module's, that of a callback under the callbacks, of other plugins at the top.
        keys = [*checkpoint["state_dict"]] if is_metric(plugin) else [*checkpoint.get("callbacks", {}), *checkpoint]
        name = "metric." if is_metric(plugin) else type(plugin).__name__
        assert any(name in key for key in keys) or not _has_state(row, plugin), "its state was not saved"
    own = row.class_path.partition(".")[0]
    assert not [entry for entry in allowed if own in str(entry)], "classes were put on the safe list"


def _has_state(row: Row, plugin: Any) -> bool:
    if isinstance(row.settings, StrategySettings):
        return row.settings.saves
    return hasattr(plugin, "state_dict") and bool(plugin.state_dict())


# ---------------------------------------------------------------------------------------------------- 10


def check_company(row: Row, other: Row, tmp_path: Path) -> None:
    """Two plugins in one Trainer train and resume bit-exactly and leave nothing behind, or the error names both."""
    pattern = row.settings.conflicts.get(other.name) or other.settings.conflicts.get(row.name)
    if pattern is None and row.kind == "strategy":
        # Saving is the end of a round, and brings together what processes have made of gradients of their own. It is
        # in the middle of a round, with a step between it and a change of tasks.
        check_resume(row, tmp_path, company=(other,), cut=CUT - 1, rounds=True)
        return
    if pattern is None:
        check_leftovers(row, other, check_resume(row, tmp_path, company=(other,), brief=True))
        return
    with pytest.raises(ValueError, match=pattern) as caught:
        fit([row.settings.make(), other.settings.make()], max_steps=2)
    for name in (row.class_name, other.class_name):
        assert name in str(caught.value), f"the error does not name {name}: {caught.value}"


def check_precision_company(row: Row, precision: str, tmp_path: Path) -> None:
    """The plugin trains and resumes bit-exactly under one of the host's precisions."""
    row, settings = on_top_of(row, {"precision": precision})
    check_resume(row, tmp_path, brief=True, **settings)
