"""The eleven contracts, each a function over one row that raises ``AssertionError`` where the plugin breaks it.

They know no method by name: what differs between methods is in its row of ``settings.py``.
"""

import copy
import importlib
import inspect
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from contract.harness import (
    BATCHES,
    MODULES,
    QUIET,
    DictNet,
    Net,
    Run,
    SaveAt,
    Step,
    Stream,
    assert_same,
    attach,
    differences,
    fit,
)
from contract.workers import Pair
from lightning.pytorch import Callback, LightningModule, Trainer

STEPS, CUT = 14, 8  # CUT is in the middle of the second epoch of six batches


@dataclass(frozen=True)
class Settings:
    """What the contracts need to know about one method.

    Attributes:
        make: The plugin with settings that make its effect visible within :data:`STEPS` optimizer steps.
        oracle: Recomputes from the recorded steps what the plugin should have done, and asserts that it did.
        identity: The plugin at the setting that changes nothing; ``None`` with a reason in ``expected_failures``.
        refused_modules: Kinds of module (keys of ``harness.MODULES``) that give a clear error, with a pattern of it.
        conflicts: Names of methods that cannot be in the same Trainer, with a pattern of the error.
        twin: How the single-process run that two processes have to equal is made; by default the same plugin.
        expected_failures: Names of contracts that cannot hold, with the reason.
    """

    make: Callable[[], Any]
    oracle: Callable[[Run, Any], None]
    identity: Callable[[], Any] | None
    refused_modules: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)
    twin: Callable[[], Any] | None = None
    expected_failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A method under contract."""

    name: str
    class_path: str
    settings: Settings
    addons: tuple[Path, ...] = ()
    card: Path | None = None

    @property
    def class_name(self) -> str:
        return self.class_path.rpartition(".")[2]


# ---------------------------------------------------------------------------------------------------- 1


def check_resume(row: Row, tmp_path: Path, company: tuple[Row, ...] = (), **settings: Any) -> None:
    """N + M steps equal N steps, a checkpoint, new objects, and M steps, bit by bit."""
    rows = (row, *company)
    path = str(tmp_path / "cut.ckpt")

    def plugins() -> list[Any]:
        return [member.settings.make() for member in rows]

    common = {"max_steps": STEPS, "validation": None, "val_check_interval": 4, **settings}
    common["validation"] = Stream(2, seed=5)
    straight = fit(plugins(), **common)
    again = fit([*plugins(), SaveAt(CUT, path)], **{**common, "validation": Stream(2, seed=5)})
    assert_same(again.snapshot()["weights"], straight.snapshot()["weights"], "saving a checkpoint changed training")

    resumed = fit(plugins(), ckpt_path=path, **{**common, "validation": Stream(2, seed=5)})
    assert len(straight.steps) == STEPS, f"the run took {len(straight.steps)} optimizer steps, not {STEPS}"
    assert_same(_comparable(resumed), _comparable(straight, skip=CUT), "resumed run against uninterrupted run")


def _comparable(run: Run, skip: int = 0) -> dict[str, Any]:
    from_step = STEPS - len(run.steps) + skip
    return {**run.snapshot(from_step), "steps": [step._asdict() for step in run.steps[skip:]]}


# ---------------------------------------------------------------------------------------------------- 2


def check_yaml(row: Row, tmp_path: Path) -> None:
    """Each addon builds the plugin through LightningCLI, beside a user's own callbacks; the saved config does again."""
    assert row.addons, f"{row.name} has no addon template"
    for addon in row.addons:
        assert addon.exists(), f"{addon} does not exist"
        first = _command_line(["--config", str(_own_config(tmp_path)), "--config", str(addon)])
        saved = tmp_path / f"saved-{addon.stem}.yaml"
        first.parser.save(first.config, saved, overwrite=True)
        second = _command_line(["--config", str(saved)])
        built = []
        for command in (first, second):
            kinds = [type(callback).__name__ for callback in command.trainer.callbacks]
            assert "LearningRateMonitor" in kinds, f"{addon.name} replaced the user's own callbacks: {kinds}"
            assert kinds.count(row.class_name) == 1, f"{addon.name} did not add one {row.class_name}: {kinds}"
            built.append(command.trainer.callbacks[kinds.index(row.class_name)])
        assert_same(_public(built[1]), _public(built[0]), f"{row.class_name} from the saved config of {addon.name}")


def _own_config(tmp_path: Path) -> Path:
    """Write a user's config, with a callback of its own."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
                "trainer": {
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_checkpointing": False,
                    "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
                },
            }
        )
    )
    return config


def _command_line(arguments: list[str]) -> Any:
    from lightning_stable.cli.training import StableCLI

    return StableCLI(arguments, run=False)


def _public(plugin: Any) -> dict[str, Any]:
    return {name: str(value) for name, value in vars(plugin).items() if not name.startswith("_")}


# ---------------------------------------------------------------------------------------------------- 3


def check_inert(row: Row, tmp_path: Path) -> None:
    """At its identity setting the plugin changes no bit of the trajectory: weights, rates, random numbers, logs."""
    assert row.settings.identity is not None, f"{row.name} states no identity setting"

    def run(plugins: list[Any]) -> dict[str, Any]:
        torch.manual_seed(3)
        done = fit(
            plugins, module=Net(dropout=0.3), validation=Stream(2, seed=5), max_steps=STEPS, val_check_interval=3
        )
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
    without = run([])
    plain_logs = without["logged"]
    assert_same(run([row.settings.identity()]), without, f"{row.name} at its identity against nothing at all")


# ---------------------------------------------------------------------------------------------------- 4


def two_process_job(make_path: str) -> dict[str, Any]:
    """Run in each of two processes: fit under DDP and return what the ranks have to agree in."""
    # Apart from the other rank, and from where the processes were started.
    os.chdir(tempfile.mkdtemp())
    plugin = resolve(make_path)()
    run = fit(
        [plugin],
        module=Net(norm=False),
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        val_check_interval=4,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
    )
    return {**run.snapshot(), "steps": [step._asdict() for step in run.steps]}


def check_two_processes(row: Row, workers: Pair, make_path: str) -> None:
    """Two gloo processes end bit-equal, and equal to one process that sees the same samples (or the row's twin)."""
    first, second = workers.run("contract.contracts:two_process_job", make_path=make_path)
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
    assert_same(
        [first[key] for key in (*shared, "logged")],
        [expected[key] for key in (*shared, "logged")],
        "two processes against one",
        tolerance=2e-4,
    )


def resolve(path: str) -> Any:
    """Return what ``module:name.name`` or ``module:name[key].attribute`` means, for jobs that cross processes."""
    module, _, expression = path.partition(":")
    name, *rest = re.split(r"[.\[]", expression)
    value = getattr(importlib.import_module(module), name)
    for part in rest:
        value = value[part.rstrip("]")] if part.endswith("]") else getattr(value, part)
    return value


# ---------------------------------------------------------------------------------------------------- 5

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


def check_oracle(row: Row, how: str, tmp_path: Path) -> None:
    """Under accumulation, clipping and bf16-mixed the plugin does what its oracle says, for every optimizer step."""
    plugin = row.settings.make()
    run = fit([plugin], validation=Stream(2, seed=5), max_steps=STEPS, check_val_every_n_epoch=1, **PRECISIONS[how])
    assert len(run.steps) == STEPS
    row.settings.oracle(run, plugin)


# ---------------------------------------------------------------------------------------------------- 6


def check_exception(row: Row, where: str, tmp_path: Path) -> None:
    """After a failure in a training or validation step nothing of the plugin is left, and the module trains on."""
    module = DictNet()
    hooks = _hooks(module)
    module.fail_at = (where, CUT)
    plugin = row.settings.make()
    run = Run(None, module, [plugin])
    trainer = Trainer(
        **attach([plugin], {**QUIET, "max_steps": STEPS, "val_check_interval": 2, "num_sanity_val_steps": 0})
    )
    with pytest.raises(RuntimeError, match="deliberate failure"):
        trainer.fit(module, Stream(), Stream(2, seed=5))
    assert len(run.steps) == CUT, f"the failure came after {len(run.steps)} steps, not {CUT}"
    _assert_nothing_left(module, trainer, hooks)
    now = {name: value.detach() for name, value in module.named_parameters()}
    assert_same(now, run.steps[-1].weights, "weights after the exception against the live ones")

    module.fail_at = None
    # The host leaves a module whose validation failed in eval mode, with or without a plugin.
    module.train()
    on = fit([], module=module, max_steps=3)
    assert len(on.steps) == CUT + 3
    assert_same(on.steps[CUT].before, run.steps[CUT - 1].weights, "the module that trains on")
    assert _is_finite(module), "weights are not finite after training on"


def _hooks(module: LightningModule) -> dict[str, int]:
    """Count every kind of hook on every submodule."""
    kinds = [name for name in vars(module) if name.endswith("_hooks")]
    return {f"{name}.{kind}": len(vars(part)[kind]) for name, part in module.named_modules() for kind in kinds}


def _assert_nothing_left(module: LightningModule, trainer: Trainer, hooks: dict[str, int]) -> None:
    assert _hooks(module) == hooks, f"hooks are left: {set(_hooks(module).items()) ^ set(hooks.items())}"
    for target in (*module.modules(), trainer, trainer.strategy, trainer.precision_plugin, *trainer.optimizers):
        wrapped = [
            name
            for name, value in vars(target).items()
            if callable(value) and callable(getattr(type(target), name, None)) and not isinstance(value, type)
        ]
        assert not wrapped, f"{type(target).__name__} still has wrapped methods: {wrapped}"
    for optimizer in trainer.optimizers:
        left = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
        assert not left, f"the optimizer still has hooks: {left}"


def _is_finite(module: LightningModule) -> bool:
    return all(bool(value.isfinite().all()) for value in module.state_dict().values() if value.is_floating_point())


# ---------------------------------------------------------------------------------------------------- 7


def check_reuse(row: Row, tmp_path: Path) -> None:
    """One object serves a second fit with the same and with a new Trainer, fast_dev_run and overfit_batches."""
    plugin = row.settings.make()
    module = Net()
    first = fit([plugin], module=module, validation=Stream(2, seed=5), max_steps=STEPS)
    _assert_trained(first.steps[:STEPS], module, "first fit")

    first.trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    fit([plugin], module=module, trainer=first.trainer, validation=Stream(2, seed=5))
    assert len(module.steps) == 2 * STEPS, f"the same Trainer took {len(module.steps) - STEPS} more steps, not {STEPS}"
    _assert_trained(module.steps[STEPS:], module, "second fit, same Trainer")

    fit([plugin], module=module, validation=Stream(2, seed=5), max_steps=STEPS)
    assert len(module.steps) == 3 * STEPS, f"a new Trainer took {len(module.steps) - 2 * STEPS} steps, not {STEPS}"
    _assert_trained(module.steps[2 * STEPS :], module, "third fit, new Trainer")

    other = Net()
    fit([plugin], module=other, validation=Stream(2, seed=5), max_steps=STEPS)
    fresh = Net()
    fit([row.settings.make()], module=fresh, validation=Stream(2, seed=5), max_steps=STEPS)
    assert_same(other.state_dict(), fresh.state_dict(), "a used object on another module against a fresh object")

    smoke = fit([plugin], validation=Stream(2, seed=5), fast_dev_run=BATCHES)
    _assert_trained(smoke.steps, smoke.module, "fast_dev_run")
    over = fit([plugin], validation=Stream(2, seed=5), overfit_batches=3, max_steps=STEPS)
    _assert_trained(over.steps, over.module, "overfit_batches")


def _assert_trained(steps: list[Step], module: LightningModule, what: str) -> None:
    """Fail if the module ends where the fit began, or not on the way that its optimizer took."""
    assert steps, f"{what}: no optimizer step was taken"
    assert _is_finite(module), f"{what}: weights are not finite"
    end = {name: value.detach() for name, value in module.named_parameters()}
    assert differences(end, steps[0].before), f"{what}: training was discarded, the weights are those it began with"
    # Averages, merges and the like stay within the region that training went through.
    for name, value in end.items():
        seen = torch.stack([steps[0].before[name], *(step.weights[name] for step in steps)])
        reach = seen.amax(0) - seen.amin(0)
        outside = (value > seen.amax(0) + reach + 1e-6) | (value < seen.amin(0) - reach - 1e-6)
        assert not bool(outside.any()), f"{what}: {name} ends far from where this fit trained it"


# ---------------------------------------------------------------------------------------------------- 8


def check_any_module(row: Row, kind: str, tmp_path: Path) -> None:
    """The plugin works with this kind of module, or says clearly that it does not and what to do."""
    case = MODULES[kind]()
    before = copy.deepcopy(case.module.state_dict())

    def run() -> None:
        settings: dict[str, Any] = {"max_steps": STEPS, "limit_val_batches": 2}
        if kind == "two optimizers":
            settings["max_steps"] = 2 * STEPS
        own = case.train is None
        fit(
            [row.settings.make()],
            module=case.module,
            train=case.train,
            validation=case.validation,
            own_loaders=own,
            **settings,
        )

    if kind in row.settings.refused_modules:
        with pytest.raises(ValueError, match=row.settings.refused_modules[kind]) as caught:
            run()
        assert row.class_name in str(caught.value), f"the error does not name {row.class_name}: {caught.value}"
        return
    run()
    assert differences(case.module.state_dict(), before), "the module did not train"
    assert _is_finite(case.module)


# ---------------------------------------------------------------------------------------------------- 9


def check_safe_load(row: Row, tmp_path: Path) -> None:
    """Its checkpoint loads with ``weights_only=True`` and nothing allowed beside, in the middle and after the end."""
    path = tmp_path / "safe.ckpt"
    run = fit([row.settings.make(), SaveAt(CUT, str(path))], validation=Stream(2, seed=5), max_steps=STEPS)
    end = tmp_path / "end.ckpt"
    run.trainer.save_checkpoint(end)
    allowed = torch.serialization.get_safe_globals()
    for saved in (path, end):
        checkpoint = torch.load(saved, weights_only=True)
        assert any(row.class_name in key for key in checkpoint["callbacks"]) or not _has_state(run.plugins[0])
    assert not [entry for entry in allowed if "lightning_stable" in str(entry)], "classes were put on the safe list"


def _has_state(plugin: Any) -> bool:
    return not isinstance(plugin, Callback) or type(plugin).state_dict is not Callback.state_dict


# ---------------------------------------------------------------------------------------------------- 10


def check_company(row: Row, other: Row, tmp_path: Path) -> None:
    """Two plugins in one Trainer train and resume bit-exactly, or the error names both."""
    pattern = row.settings.conflicts.get(other.name) or other.settings.conflicts.get(row.name)
    if pattern is None:
        check_resume(row, tmp_path, company=(other,))
        return
    with pytest.raises(ValueError, match=pattern) as caught:
        fit([row.settings.make(), other.settings.make()], max_steps=2)
    for name in (row.class_name, other.class_name):
        assert name in str(caught.value), f"the error does not name {name}: {caught.value}"


def check_precision_company(row: Row, precision: str, tmp_path: Path) -> None:
    """The plugin trains and resumes bit-exactly under one of the host's precisions."""
    check_resume(row, tmp_path, precision=precision)


# ---------------------------------------------------------------------------------------------------- 11

HEADINGS = (
    "In one line",
    "Use it",
    "How it works",
    "Settings",
    "Works with",
    "Cost",
    "Fails when",
    "Evidence",
    "Reference",
)


def check_card(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card has the fixed headings in order, names each argument and each expected failure, and its code runs."""
    assert row.card is not None
    assert row.card.exists(), f"{row.card} does not exist"
    text = row.card.read_text(encoding="utf-8")
    headings = tuple(re.findall(r"^## (.+)$", text, flags=re.MULTILINE))
    assert headings == HEADINGS, f"{row.card.name} has the headings {headings}, not {HEADINGS}"
    arguments = [name for name in _arguments(row) if f"`{name}`" not in text]
    assert not arguments, f"{row.card.name} does not name the settings {arguments}"
    for reason in row.settings.expected_failures.values():
        assert reason in text, f"{row.card.name} does not say: {reason}"
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert any(language == "python" for language, _ in blocks), f"{row.card.name} has no Python example"
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "card"}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, row.card.name, "exec"), scope)  # noqa: S102  the card's own code, which has to run
        elif language == "yaml":
            assert isinstance(yaml.safe_load(code), dict), f"{row.card.name}: a YAML block is no mapping"


def _arguments(row: Row) -> list[str]:
    module, _, name = row.class_path.rpartition(".")
    return [argument for argument in inspect.signature(resolve(f"{module}:{name}")).parameters if argument != "self"]
