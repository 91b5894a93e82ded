"""LogitSharpness: what it reports of a classifier and of a language model, where it looks, that it changes nothing."""

from typing import Any

import pytest
import torch
from gradients import entries
from lightning.pytorch import LightningModule, Trainer
from oracles import logit_sharpness_twin as twin
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stable.callbacks.ema import EMA
from lightning_stable.callbacks.lae import LAE
from lightning_stable.callbacks.logit_sharpness import LogitSharpness
from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.numerics_monitor import NumericsMonitor
from lightning_stable.callbacks.sam import SAM
from lightning_stable.testing.harness import (
    MODULES,
    QUIET,
    DictNet,
    ManualNet,
    MemoryLogger,
    Net,
    Stream,
    TwoOptimizerNet,
    assert_same,
    fit,
)
from lightning_stable.testing.workers import Pair

NAME, TRAIN = "logit_sharpness", "logit_sharpness_train"
CLASSES = 3


def classes_of(batch: Any) -> Tensor:
    """Return classes for a batch of the contracts' regression."""
    return batch[1].flatten().mul(10).long().remainder(CLASSES)


class Classifier(LightningModule):
    """Classifies, by its own output, and validates on whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LanguageModel(LightningModule):
    """Gives logits as transformers' models do, and takes labels that equal the inputs."""

    def __init__(self, shifts: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(5, 5)
        self.shifts = shifts

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.embed(input_ids)
        ahead, behind = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        return {"loss": nn.functional.cross_entropy(ahead.flatten(0, 1), behind.flatten()), "logits": logits}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch)["loss"]

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def classified(count: int = 20, seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator)), batch_size=8)


def validated(callback: LogitSharpness, module: LightningModule, loaders: Any) -> float:
    """Return what a validation logs."""
    found = Trainer(**QUIET, callbacks=[callback]).validate(module, loaders, verbose=False)[0]
    assert found[NAME] == pytest.approx(callback.latest, rel=1e-6)
    return found[NAME]


def expected(module: nn.Module, loader: DataLoader, epsilon: float) -> float:
    x, y = loader.dataset.tensors
    return twin.mean_sharpness(module(x).tolist(), y.tolist(), epsilon)


@pytest.mark.parametrize("epsilon", [1e-3, 0.2])
@pytest.mark.parametrize("logits", [None, "head"])
def test_it_is_the_mean_over_the_samples_of_a_validation(logits: str | None, epsilon: float) -> None:
    module, loader = Classifier(), classified()
    found = validated(LogitSharpness(logits, epsilon=epsilon), module, loader)
    assert found == pytest.approx(expected(module, loader, epsilon), rel=1e-5)


def test_every_loader_counts_by_its_samples_and_a_limit_holds() -> None:
    module, first, second = Classifier(), classified(20), classified(4, seed=1)
    found = validated(LogitSharpness(), module, [first, second])
    assert found == pytest.approx(
        (20 * expected(module, first, 1e-3) + 4 * expected(module, second, 1e-3)) / 24, rel=1e-5
    )
    few = classified(20)
    x, y = few.dataset.tensors
    few.dataset.tensors = (x[:16], y[:16])
    assert validated(LogitSharpness(limit_batches=2), module, first) == pytest.approx(
        expected(module, few, 1e-3), rel=1e-5
    )


class KeyedClassifier(Classifier):
    """Takes batches of other kinds."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["inputs"]["x"]).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch["inputs"]["x"])


@pytest.mark.parametrize(
    ("targets", "key"),
    [
        ("kinds", "kinds"),
        ("batch.kinds", "kinds"),
        ("inputs.y", None),
        (lambda batch: batch["inputs"]["y"], None),
        (None, "labels"),
    ],
)
def test_targets_are_found_where_it_is_said(targets: Any, key: str | None) -> None:
    module, loader = KeyedClassifier(), classified()
    x, y = loader.dataset.tensors
    batches = [{"inputs": {"x": x[i : i + 8]} | ({} if key else {"y": y[i : i + 8]})} for i in (0, 8, 16)]
    if key:
        batches = [{**batch, key: y[i : i + 8]} for i, batch in zip((0, 8, 16), batches, strict=True)]
    found = validated(LogitSharpness(targets=targets), module, DataLoader(batches, batch_size=None))
    assert found == pytest.approx(expected(module, loader, 1e-3), rel=1e-5)


def texts(same: bool = True) -> tuple[DataLoader, Tensor, Tensor]:
    tokens = torch.randint(5, (6, 7), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone() if same else tokens.roll(-1, 1)
    labels[1, 4:] = -100  # a shorter text
    rows = [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]
    return DataLoader(rows, batch_size=3), tokens, labels


@pytest.mark.parametrize("shifts", [True, False])
def test_the_last_token_of_a_text_is_judged_where_its_target_is(shifts: bool) -> None:
    loader, tokens, labels = texts(shifts)
    module = LanguageModel(shifts)
    logits = module.embed(tokens)
    ahead, behind = (logits[:, :-1], labels[:, 1:]) if shifts else (logits, labels)
    last = [int((row != -100).nonzero().max()) for row in behind]
    rows = [ahead[row, place].tolist() for row, place in enumerate(last)]
    classes = [int(behind[row, place]) for row, place in enumerate(last)]
    assert validated(LogitSharpness(), module, loader) == pytest.approx(
        twin.mean_sharpness(rows, classes, 1e-3), rel=1e-5
    )
    present = behind != -100
    whole = twin.mean_sharpness(ahead[present].tolist(), behind[present].tolist(), 1e-3)
    assert validated(LogitSharpness(position="all"), module, loader) == pytest.approx(whole, rel=1e-5)
    wrong = validated(LogitSharpness(shift=not shifts, position="all"), module, loader)
    assert wrong != pytest.approx(whole, rel=1e-3)


def test_all_positions_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, _, _ = texts()
    whole = validated(LogitSharpness(position="all"), LanguageModel(), loader)
    monkeypatch.setattr("lightning_stable.callbacks.logit_sharpness._ENTRIES", 12)
    assert validated(LogitSharpness(position="all"), LanguageModel(), loader) == pytest.approx(whole, rel=1e-6)


def watching(**settings: Any) -> LogitSharpness:
    return LogitSharpness(logits="head", targets=classes_of, **settings)


def test_each_validation_of_a_fit_is_logged_and_can_be_monitored() -> None:
    callback = watching()
    run = fit([callback], validation=Stream(2, seed=5), max_steps=9, val_check_interval=3, num_sanity_val_steps=2)
    assert len(entries(run.logged, NAME)) == 3
    assert float(run.trainer.callback_metrics[NAME]) == pytest.approx(callback.latest)
    module = run.module.eval()
    batches = [Stream(2, seed=5).batch(index) for index in range(2)]
    heads, found = [], module.head.register_forward_hook(lambda part, inputs, output: heads.append(output))
    for batch in batches:
        module(batch[0])
    found.remove()
    rows, classes = torch.cat(heads).tolist(), [int(c) for batch in batches for c in classes_of(batch)]
    assert callback.latest == pytest.approx(twin.mean_sharpness(rows, classes, 1e-3), rel=1e-4)


def test_a_sanity_check_is_no_validation() -> None:
    callback = watching()
    fit([callback], validation=Stream(2, seed=5), max_steps=1, num_sanity_val_steps=2)
    assert callback.latest is None


def test_training_batches_are_looked_at_every_few_steps() -> None:
    run = fit([watching(every_n_steps=2)], max_steps=4, limit_val_batches=0, accumulate_grad_batches=3)
    assert sorted(entries(run.logged, TRAIN)) == [1, 3]
    assert NAME not in run.trainer.callback_metrics


@pytest.mark.parametrize("module", [ManualNet, TwoOptimizerNet])
def test_manual_optimisation(module: type[Net]) -> None:
    steps = 12 if module is TwoOptimizerNet else 6
    run = fit([watching(every_n_steps=2)], module=module(), validation=Stream(2, seed=5), max_steps=steps)
    assert list(entries(run.logged, TRAIN)) == [1, 3, 5]
    assert entries(run.logged, NAME)


class Alternating(TwoOptimizerNet):
    """Steps one of its two optimizers in each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize(("module", "batches"), [(TwoOptimizerNet, 1), (Alternating, 2)])
def test_steps_of_several_optimizers_are_counted_as_those_of_one(module: type[Net], batches: int) -> None:
    judged: list[int] = []

    class Counts(LogitSharpness):
        def _judge(self, logits: Tensor, batch: Any) -> Tensor:
            judged.append(len(logits))
            return super()._judge(logits, batch)

    sharpness = Counts(logits="head", targets=classes_of, every_n_steps=4)
    monitor = NumericsMonitor(every_n_steps=4, format="e4m3", picture=None)
    run = fit([sharpness, monitor], module=module(), max_steps=16, limit_val_batches=0)
    assert list(entries(run.logged, TRAIN)) == [3, 7]
    assert monitor.record()["steps"] == [4, 8], "the two go by one count"
    # A batch of two steps is passed twice by the module, of which the last pass counts.
    assert len(judged) == 2 * batches


@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind != "boring"])
def test_it_changes_no_bit(kind: str) -> None:
    def run(plugins: list[Any]) -> dict[str, Any]:
        torch.manual_seed(3)
        case = MODULES[kind]()
        done = fit(
            plugins, module=case.module, train=case.train, validation=case.validation, max_steps=6, limit_val_batches=2
        )
        values = [(step, {n: v for n, v in entry.items() if n not in (NAME, TRAIN)}) for step, entry in done.logged]
        return {
            "weights": done.module.state_dict(),
            "logged": [entry for entry in values if entry[1]],
            "random": torch.rand(3),
            "reported": bool(entries(done.logged, TRAIN)),
        }

    watched, plain = run([watching(every_n_steps=2)]), run([])
    assert watched.pop("reported")
    assert not plain.pop("reported")
    assert_same(watched, plain, "with the callback against without")


def test_what_the_module_returns_is_taken_without_a_name() -> None:
    case = MODULES["boring"]()
    callback = LogitSharpness(targets=lambda batch: torch.zeros(len(batch), dtype=torch.long))
    run = fit([callback], module=case.module, own_loaders=True, max_steps=6, limit_val_batches=2)
    assert callback.latest > 0
    assert not run.module._forward_hooks


def test_passes_of_other_callbacks_are_not_counted() -> None:
    class Counts(LogitSharpness):
        rows = 0

        def _judge(self, logits: Tensor, batch: Any) -> Tensor:
            Counts.rows += len(logits)
            return super()._judge(logits, batch)

    for other in (
        SAM(),
        MESA(start_epoch=0),
        EMA(decay=0.5, validate_with="both"),
        LAE(["body*"], decay=0.5, task_steps=[2]),
    ):
        for order in (1, -1):
            Counts.rows = 0
            counts = Counts(logits="head", targets=classes_of, every_n_steps=1)
            fit([counts, other][::order], validation=Stream(2, seed=5), max_steps=5, val_check_interval=5)
            assert Counts.rows == 5 * 8 + 2 * 8, type(other).__name__


def test_without_a_validation_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit([watching()], max_steps=1, limit_val_batches=0)
    assert "LogitSharpness measures in validation, and this run has none" in caplog.text


@pytest.mark.parametrize("place", ["train", "validate"])
def test_nothing_is_left_after_a_failure(place: str) -> None:
    module = DictNet()
    module.fail_at = (place, 3)
    with pytest.raises(RuntimeError, match="deliberate failure"):
        fit([watching(every_n_steps=1)], module=module, validation=Stream(2, seed=5), max_steps=6, val_check_interval=3)
    assert not {"training_step", "validation_step"} & vars(module).keys()
    assert not any(part._forward_hooks for part in module.modules())


def two_process_job() -> dict[str, Any]:
    callback, module = LogitSharpness(every_n_steps=2), Classifier()
    logger = MemoryLogger()
    trainer = Trainer(
        **{**QUIET, "logger": logger},
        callbacks=[callback],
        devices=2,
        strategy="ddp",
        max_steps=4,
        num_sanity_val_steps=0,
    )
    held_out = TensorDataset(*classified(20).dataset.tensors)
    rank = trainer.global_rank
    # Shares of different sizes: a mean of means would be another one.
    mine = TensorDataset(*(part[12 * rank : 12 + 8 * rank] for part in held_out.tensors))
    trainer.fit(module, classified(32), DataLoader(mine, batch_size=5))
    return {"latest": callback.latest, "weights": module.state_dict(), "train": entries(logger.entries, TRAIN)}


def test_two_processes_report_the_mean_over_their_samples(workers: Pair) -> None:
    first, second = workers.run("callbacks.test_logit_sharpness:two_process_job")
    assert first["latest"] == second["latest"]
    module = Classifier()
    module.load_state_dict(first["weights"])
    assert first["latest"] == pytest.approx(expected(module, classified(20), 1e-3), rel=1e-5)
    assert sorted(first["train"]) == [1, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": ""}, r"logits='' is not the dotted name of a submodule"),
        ({"targets": 1.5}, r"targets=1.5 is no key, place or function"),
        ({"targets": True}, r"targets=True is no key"),
        ({"position": "first"}, r"position='first' is unknown. Choose one of 'last', 'all'"),
        ({"shift": "yes"}, r"shift='yes' is not True, False or None"),
        ({"epsilon": 0.0}, r"epsilon=0.0 is not a finite number above 0"),
        ({"limit_batches": 0}, r"limit_batches=0 is not a whole number of batches from 1 on"),
        ({"every_n_steps": 0}, r"every_n_steps=0 is not a whole number of optimizer steps from 1 on"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitSharpness(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": "tail"}, r"logits='tail' of LogitSharpness is no submodule of Classifier\. Candidates: 'head'"),
        ({"targets": 4}, r"LogitSharpness\(targets=4\) finds no tensor of classes in a batch, which is a list of 2"),
        ({"targets": "labels"}, r"LogitSharpness\(targets='labels'\) finds no tensor"),
        ({"targets": 0}, r"LogitSharpness, with logits of None: Targets are torch.float32"),
        ({"targets": lambda batch: batch[1].float()}, r"Targets are torch.float32, .* even where each is a whole"),
        ({"targets": lambda batch: batch[1][:3]}, r"Targets of shape \(3,\) do not fit logits of shape \(8, 3\)"),
    ],
)
def test_what_cannot_be_judged_is_told_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(LogitSharpness(**settings), Classifier(), classified())


def test_a_module_that_is_not_called_or_gives_no_logits_is_told() -> None:
    class Around(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.head(batch[0])

    with pytest.raises(ValueError, match=r"'Around' was not called in the step.*logits='head'"):
        validated(LogitSharpness(), Around(), classified())

    class Flat(LanguageModel):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": torch.zeros(()), "logits": input_ids}

    with pytest.raises(ValueError, match=r"what Flat itself returns is dict of shape \(3, 7\), not logits"):
        validated(LogitSharpness(), Flat(), texts()[0])
