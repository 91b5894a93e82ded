"""The contracts on going on: 1, resuming, 6, after a failure, and 7, using an object again."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torchmetrics import Metric
from typing_extensions import override

from lightning_stable.testing.feeding import without_metric
from lightning_stable.testing.harness import (
    BATCHES,
    QUIET,
    AskAt,
    DictNet,
    Net,
    Run,
    SaveAt,
    Step,
    Stream,
    assert_same,
    attach,
    differences,
    entries_so_far,
    fit,
    once,
)
from lightning_stable.testing.rows import CUT, STEPS, Row
from lightning_stable.testing.workers import of_all_ranks, of_rank_zero, processes

__all__ = [
    "FAILURES",
    "MOMENTS",
    "check_exception",
    "check_failing_test",
    "check_leftovers",
    "check_resume",
    "check_reuse",
    "is_finite",
]

# ---------------------------------------------------------------------------------------------------- 1


MOMENTS = {"batch end": CUT, "validation end": 10, "epoch end": BATCHES}
"""The optimizer step after which each kind of checkpoint is saved.

The first is in the middle of an epoch, the second in the validation after the fourth batch of the second epoch, the
third at the end of the first epoch.
"""

# Resumed at the end of an epoch, the host runs a validation that is inside an epoch one batch late, with no plugin.
_VALIDATION: dict[str, dict[str, Any]] = {"epoch end": {"val_check_interval": 1.0}}


def check_resume(
    row: Row,
    tmp_path: Path,
    company: tuple[Row, ...] = (),
    moment: str = "batch end",
    cut: int | None = None,
    rounds: bool = False,
    brief: bool = False,
    **settings: Any,
) -> Run:
    """N + M steps equal N steps, a checkpoint, and M steps with new or with used objects, bit by bit.

    The uninterrupted run saves nothing, and equals one that does. Where saving is the end of a round, as a row or
    ``rounds`` may say, it saves at the same step. So it does in a ``brief`` check, since they are many: there nothing
    of what is trained may change while the checkpoint is saved. Nothing may be left of the plugins after that run,
    which is returned, and its objects are those that are used again: what they hold is six steps ahead of the
    checkpoint.
    """
    cut = MOMENTS[moment] if cut is None else cut
    path = Path(of_rank_zero(tempfile.mkdtemp(dir=tmp_path))) / f"step={cut}.ckpt"

    def plugins() -> list[Any]:
        return [member.settings.make() for member in (row, *company)]

    def run(objects: list[Any], *others: Callback, **more: Any) -> Run:
        # With and without a checkpoint in the same configuration, which is what the two have to agree in.
        saving = {"enable_checkpointing": any(isinstance(other, ModelCheckpoint) for other in others)}
        common = {"max_steps": STEPS, **_VALIDATION.get(moment, {"val_check_interval": 4}), **saving, **settings}
        return fit([*objects, *others], validation=Stream(2, seed=5), **common, **more)

    rounds = rounds or any(member.has_rounds for member in (row, *company))
    first = plugins()
    saver = _saver(moment, cut, path, unseen=first if brief and not rounds else None)
    straight = again = run(first, saver)
    if brief and not rounds:
        _assert_nothing_left(straight.module, straight.trainer, _hooks(Net()))
    elif not rounds:
        straight = run(plugins())
        assert_same(again.snapshot()["weights"], straight.snapshot()["weights"], "saving a checkpoint changed training")
    assert len(straight.steps) == STEPS, f"the run took {len(straight.steps)} optimizer steps, not {STEPS}"
    assert path.exists(), f"nothing was saved at {moment} of step {cut}"

    # A checkpoint of the host's ModelCheckpoint wants one in the run that goes on.
    others = [_saver(moment, cut, path)] if moment == "epoch end" else []
    size = len(company) + 1
    # Resumed at the end of an epoch, the host logs the same values under other numbers of step and epoch.
    numbered = moment != "epoch end"
    # What a plugin reported of the last step before the checkpoint was saved is not reported again.
    straight.logged = straight.logged[saver.logged :]
    expected = _comparable(straight, skip=cut, plugins=size, numbered=numbered)
    resumed = _comparable(run(plugins(), *others, ckpt_path=str(path)), plugins=size, numbered=numbered)
    assert_same(resumed, expected, "resumed run against uninterrupted run")
    used = straight.plugins[:size] if brief else plugins()
    if any(isinstance(plugin, Strategy) for plugin in used):
        return straight  # it belongs to its Trainer: the host refuses it in another one

    if not brief:
        run(used, module=Net(rates=(0.03, 0.01)))
    resumed = _comparable(run(used, *others, ckpt_path=str(path)), plugins=size, numbered=numbered)
    assert_same(resumed, expected, "run resumed with used objects against uninterrupted run")
    return straight


def _for_another_trainer(used: list[Any], new: list[Any]) -> list[Any]:
    """Return used objects, and a new one in the place of a strategy: it belongs to its Trainer."""
    return [other if isinstance(one, Strategy) else one for one, other in zip(used, new, strict=True)]


class _SaveEpoch(ModelCheckpoint):
    """Saves at the end of each epoch, and notes how many entries the logger had at the end of the first.

    Attributes:
        logged: As those of :class:`.SaveAt`.
    """

    logged = 0

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.logged = self.logged or entries_so_far(trainer)


def _saver(moment: str, step: int, path: Path, unseen: list[Any] | None = None) -> SaveAt | _SaveEpoch:
    """Return the callback that saves at this moment, unseen by these plugins if there are any."""
    if moment == "epoch end":
        return _SaveEpoch(path.parent, "{step}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
    return SaveAt(step, str(path), moment, unseen)


def _comparable(run: Run, plugins: int, skip: int = 0, *, numbered: bool) -> dict[str, Any]:
    """Return what has to agree, of the first plugins: those under contract."""
    of_plugins = Run(run.trainer, run.module, run.plugins[:plugins], run.logged)
    found = of_plugins.snapshot(STEPS - len(run.steps) + skip)
    if not numbered:
        found["logged"] = [
            {name: value for name, value in entry.items() if name != "epoch"} for _, entry in found["logged"]
        ]
    return {**found, "steps": [step._asdict() for step in run.steps[skip:]]}


# ---------------------------------------------------------------------------------------------------- 6


FAILURES = ("train", "train, last call", "backward", "batch end", "validate", "validate, last call")
"""Where a failure comes, in the optimizer step after :data:`CUT` of them.

A plugin may run passes of its own before or after the live one, so that the first call of a step is not the live one,
or not the only one. At the end of a batch it is another callback's, after the update and before the plugin sees the
end, unless that has moved to the front.
"""


class _FailsAtBatchEnd(Callback):
    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == CUT:
            raise RuntimeError("deliberate failure of another callback")


def check_exception(row: Row, where: str, tmp_path: Path) -> None:
    """After a failure in a pass of training or validation nothing of the plugin is left, and the module trains on."""

    def trainer_of(plugin: Any, module: LightningModule, others: list[Callback]) -> Trainer:
        # What was asked for a step before has to be over, too.
        objects = [*others, plugin, *_asking(row, plugin, CUT - 1)]
        settings = {
            **QUIET,
            "devices": processes(),
            "max_steps": STEPS,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
        }
        return Trainer(**attach(objects, settings, module))

    module, plugin = DictNet(), row.settings.make()
    trainer = trainer_of(plugin, module, [_FailsAtBatchEnd()] if where == "batch end" else [])
    place, _, last = where.partition(", ")
    module.fail_at = (place, CUT)

    def run_without_failure() -> DictNet:
        whole = DictNet()
        trainer_of(row.settings.make(), whole, []).fit(whole, Stream(), Stream(2, seed=5))
        return whole

    if last or row.has_rounds:
        whole = once(row.settings, "a run without a failure", run_without_failure)
    if last:
        # How many calls there are, a run without a failure says.
        module.fail_at = (place, CUT, whole.step_calls.counts[place, CUT])
    run = Run(trainer, module, [plugin])
    hooks = _hooks(module)
    with pytest.raises(RuntimeError, match="deliberate failure"):
        trainer.fit(module, Stream(), Stream(2, seed=5))
    assert len(run.steps) == CUT, f"the failure came after {len(run.steps)} steps, not {CUT}"
    _assert_nothing_left(module, trainer, hooks)
    # A strategy may have exchanged weights since the last step.
    live = whole.steps[CUT].before if row.has_rounds else run.steps[-1].weights
    now = {name: value.detach().clone() for name, value in module.named_parameters()}
    assert_same(now, live, "weights after the exception against the live ones")

    module.fail_at = None
    # The host leaves a module whose validation failed in eval mode, with or without a plugin.
    module.train()
    on = fit([], module=module, max_steps=3)
    assert len(on.steps) == CUT + 3
    assert_same(on.steps[CUT].before, of_rank_zero(now), "the module that trains on")
    assert is_finite(module), "weights are not finite after training on"
    _assert_as_new(row, plugin, "an object that saw a failure")


def check_leftovers(row: Row, other: Row, whole: Run) -> None:
    """After failures nothing is left of two plugins in one Trainer, whichever is undone first.

    Args:
        row: One of them.
        other: The other one.
        whole: A run of them without a failure, which says how many calls of a step there are.
    """
    assert isinstance(whole.module, Net)
    for call in sorted({1, whole.module.step_calls.counts["train", 2]}):
        module = DictNet()
        module.fail_at = "train", 2, call
        plugins = [row.settings.make(), other.settings.make()]
        trainer = Trainer(**attach(plugins, {**QUIET, "devices": processes(), "max_steps": STEPS}, module))
        hooks = _hooks(module)
        with pytest.raises(RuntimeError, match="deliberate failure"):
            trainer.fit(module, Stream())
        _assert_nothing_left(module, trainer, hooks)


def check_failing_test(row: Row, tmp_path: Path) -> None:
    """A test that fails after a fit leaves the module's weights as they were, in the same and in a new Trainer."""
    plugin = row.settings.make()
    module = Net()
    run = fit([plugin], module=module, validation=Stream(2, seed=5), max_steps=STEPS)
    # The host lets all processes test with the buffers of rank 0.
    before = of_rank_zero(copy.deepcopy(module.state_dict()))
    (again,) = _for_another_trainer([plugin], [row.settings.make()])
    new = Trainer(**attach([again], {**QUIET, "devices": processes()}, module))
    for trainer, which in ((run.trainer, "the same Trainer"), (new, "a new Trainer")):
        module.fail_at = ("test", trainer.global_step)
        with pytest.raises(RuntimeError, match="deliberate failure"):
            trainer.test(module, Stream(2, seed=5), verbose=False)
        assert_same(module.state_dict(), before, f"weights after a failing test in {which}")
    _assert_as_new(row, plugin, "an object that saw a failing test")


def _asking(row: Row, plugin: Any, step: int) -> list[Callback]:
    """Return the callback that asks what a user may ask, if there is something."""
    return [] if row.settings.ask is None else [AskAt(step, plugin, row.settings.ask)]


def _assert_as_new(row: Row, plugin: Any, what: str) -> None:
    """Fail if a used object trains another module otherwise than a fresh object.

    A strategy is not used again: that a fresh one trains in the same process has to be enough.
    """
    used = fit(_for_another_trainer([plugin], [row.settings.make()]), validation=Stream(2, seed=5), max_steps=STEPS)
    if isinstance(plugin, Strategy):
        assert len(used.steps) == STEPS, f"{what} took {len(used.steps)} steps, not {STEPS}"
        return

    def run_of_a_fresh_object() -> dict[str, Any]:
        return fit([row.settings.make()], validation=Stream(2, seed=5), max_steps=STEPS).snapshot()

    fresh = once(row.settings, "a run of a fresh object", run_of_a_fresh_object)
    assert_same(used.snapshot(), fresh, f"{what} on another module against a fresh object")


def _hooks(module: LightningModule) -> dict[str, int]:
    """Count every kind of hook on every submodule that has any: adapters bring new submodules."""
    kinds = [name for name in vars(module) if name.endswith("_hooks")]
    counts = {f"{name}.{kind}": len(vars(part)[kind]) for name, part in module.named_modules() for kind in kinds}
    return {name: count for name, count in counts.items() if count}


def _assert_nothing_left(module: LightningModule, trainer: Trainer, hooks: dict[str, int]) -> None:
    assert _hooks(module) == hooks, f"hooks are left: {set(_hooks(module).items()) ^ set(hooks.items())}"
    # Every metric of torchmetrics wraps its own methods.
    parts = [part for part in module.modules() if not isinstance(part, Metric)]
    for target in (*parts, trainer, trainer.strategy, trainer.precision_plugin, *trainer.optimizers):
        wrapped = [name for name, value in vars(target).items() if _is_wrap(target, name, value)]
        assert not wrapped, f"{type(target).__name__} still has wrapped methods: {wrapped}"
    for optimizer in trainer.optimizers:
        left = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
        assert not left, f"the optimizer still has hooks: {left}"


def _is_wrap(target: Any, name: str, value: Any) -> bool:
    """Tell whether an attribute of an object hides a method of its class."""
    own = getattr(type(target), name, None)
    # Where a strategy wraps the module, the host itself leaves the very method as an attribute.
    return (
        callable(value) and callable(own) and not isinstance(value, type) and getattr(value, "__func__", 0) is not own
    )


def is_finite(module: LightningModule) -> bool:
    """Tell whether all weights and buffers are finite."""
    return all(bool(value.isfinite().all()) for value in without_metric(module).values() if value.is_floating_point())


# ---------------------------------------------------------------------------------------------------- 7


def check_reuse(row: Row, tmp_path: Path) -> None:
    """One object serves a second fit with the same and with a new Trainer, fast_dev_run and overfit_batches."""
    plugin = row.settings.make()
    module = Net()

    def again() -> list[Any]:
        return _for_another_trainer([plugin], [row.settings.make()])

    first = fit([plugin], module=module, validation=Stream(2, seed=5), max_steps=STEPS)
    _assert_trained(first.steps[:STEPS], module, "first fit")

    first.trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    fit([plugin], module=module, trainer=first.trainer, validation=Stream(2, seed=5))
    assert len(module.steps) == 2 * STEPS, f"the same Trainer took {len(module.steps) - STEPS} more steps, not {STEPS}"
    _assert_trained(module.steps[STEPS:], module, "second fit, same Trainer")

    fit(again(), module=module, validation=Stream(2, seed=5), max_steps=STEPS)
    assert len(module.steps) == 3 * STEPS, f"a new Trainer took {len(module.steps) - 2 * STEPS} steps, not {STEPS}"
    _assert_trained(module.steps[2 * STEPS :], module, "third fit, new Trainer")

    _assert_as_new(row, plugin, "a used object")
    _check_validation_between(row, tmp_path)

    smoke = fit(again(), validation=Stream(2, seed=5), fast_dev_run=BATCHES)
    _assert_trained(smoke.steps, smoke.module, "fast_dev_run")
    over = fit(again(), validation=Stream(2, seed=5), overfit_batches=3, max_steps=STEPS)
    _assert_trained(over.steps, over.module, "overfit_batches")


def _check_validation_between(row: Row, tmp_path: Path) -> None:
    """Fail if validating a checkpoint between two fits of an object changes the second one."""
    plugin, path = row.settings.make(), tmp_path / "between.ckpt"
    savers = [*_asking(row, plugin, CUT - 1), SaveAt(CUT, str(path))]
    first = fit([plugin, *savers], validation=Stream(2, seed=5), max_steps=STEPS)
    again = _for_another_trainer([plugin], [row.settings.make()])
    trainer = Trainer(**attach(again, {**QUIET, "devices": processes()}, first.module))
    trainer.validate(first.module, Stream(2, seed=5), ckpt_path=str(path), verbose=False)
    _assert_as_new(row, plugin, "an object that validated a checkpoint")


def _assert_trained(steps: list[Step], module: LightningModule, what: str) -> None:
    """Fail if the module ends where the fit began, or not on the way that its optimizer took."""
    assert steps, f"{what}: no optimizer step was taken"
    assert is_finite(module), f"{what}: weights are not finite"
    end = {name: value.detach() for name, value in module.named_parameters()}
    assert differences(end, steps[0].before), f"{what}: training was discarded, the weights are those it began with"
    # Averages, merges and the like stay within the region that training, of all processes, went through.
    everyones = [each for own in of_all_ranks([steps[0].before, *(step.weights for step in steps)]) for each in own]
    for name, value in end.items():
        seen = torch.stack([weights[name] for weights in everyones])
        reach = seen.amax(0) - seen.amin(0)
        outside = (value > seen.amax(0) + reach + 1e-6) | (value < seen.amin(0) - reach - 1e-6)
        assert not bool(outside.any()), f"{what}: {name} ends far from where this fit trained it"
