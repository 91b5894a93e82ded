"""StabilityGap measures what a loop by hand measures, wherever tasks come from, and leaves training alone."""

import logging
from typing import Any

import pytest
import torch
from callbacks.gap_runs import CLASSES, FEATURES, Classifier, loaders, run, samples, train
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_stable.callbacks import EMA
from lightning_stable.callbacks.stability_gap import StabilityGap
from lightning_stable.testing.harness import QUIET


class ByHand(Callback):
    """Evaluates after each step, as one would write it down."""

    def __init__(self, tasks: list[DataLoader]) -> None:
        self.tasks = tasks
        self.seen: list[tuple[int, list[float], list[float]]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.eval()
        right, losses = [], []
        with torch.no_grad():
            for loader in self.tasks:
                x, y = loader.dataset[:] if isinstance(loader.dataset, TensorDataset) else next(iter(loader))
                logits = pl_module(x)
                right.append(float((logits.argmax(1) == y).float().mean()))
                losses.append(float(nn.functional.cross_entropy(logits, y)))
        pl_module.train()
        self.seen.append((trainer.global_step, right, losses))


def curve(gap: StabilityGap, task: int, weights: str = "live") -> dict[int, float]:
    """Return the score of a task after each number of steps: the last, where it was evaluated twice."""
    entry = next(entry for entry in gap.record()["series"][weights] if entry["task"] == task)
    return dict(zip(entry["steps"], entry["scores"], strict=True))


@pytest.mark.parametrize("score", ["accuracy", "loss"])
def test_scores_are_those_of_a_loop_by_hand(score: str) -> None:
    tasks = loaders()
    gap, hand = StabilityGap(tasks, score=score, task_steps=[3]), ByHand(tasks)
    run(gap, hand)
    for step, right, losses in hand.seen:
        expected = right if score == "accuracy" else losses
        assert curve(gap, 0)[step] == pytest.approx(expected[0], abs=1e-6)
        if step >= 3:
            assert curve(gap, 1)[step] == pytest.approx(expected[1], abs=1e-6)
    assert min(curve(gap, 1)) == 3  # before the first update of its task
    assert gap.record()["switches"] == [{"task": 0, "step": 0}, {"task": 1, "step": 3}]


def per_sample(module: LightningModule, batch: Any) -> Tensor:
    return (module(batch[0]).argmax(1) == batch[1]).float()


def as_mean(module: LightningModule, batch: Any) -> Tensor:
    return per_sample(module, batch).mean()


@pytest.mark.parametrize(
    "score",
    [
        per_sample,
        as_mean,
        MulticlassAccuracy(CLASSES, average="micro"),
        f"{__name__}.per_sample",
    ],
    ids=["values", "mean", "metric", "dotted path"],
)
def test_every_kind_of_score_measures_the_same(score: Any) -> None:
    tasks = loaders(count=13)
    plain = StabilityGap(tasks, task_steps=[3])
    run(plain)
    other = StabilityGap(tasks, score=score, higher_is_better=True, batch_size=4, task_steps=[3])
    run(other)
    for task in (0, 1):
        assert curve(other, task) == pytest.approx(curve(plain, task), abs=1e-6)


def test_the_logits_of_a_named_submodule_are_those_of_the_validation_step() -> None:
    class Unusual(Classifier):
        def forward(self, x: Tensor, scale: float) -> Tensor:  # cannot be called with inputs alone
            return self.head(self.body(x)) * scale

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0], 1.0), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    tasks = loaders()
    plain, named = StabilityGap(tasks, task_steps=[3]), StabilityGap(tasks, logits="head", task_steps=[3])
    run(plain)
    run(named, module=Unusual())
    assert curve(named, 0) == curve(plain, 0)
    with pytest.raises(ValueError, match=r"forward could not be called.*argument logits.*Candidates: .*'head'"):
        run(StabilityGap(tasks), module=Unusual())


def test_live_weights_and_the_average_are_separate_series() -> None:
    tasks = loaders()

    class Average(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, float] = {}

        @override
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            shadow = Classifier()
            shadow.load_state_dict({**pl_module.state_dict(), **ema.averaged()})
            x, y = tasks[0].dataset[:]
            self.seen[trainer.global_step] = float((shadow.eval()(x).argmax(1) == y).float().mean())

    ema, gap, hand = EMA(decay=0.8, start_step=2), StabilityGap(tasks, task_steps=[4]), Average()
    run(gap, ema, hand)
    found = curve(gap, 0, "ema")
    assert min(found) == 2
    assert {step: found[step] for step in hand.seen if step >= 2} == pytest.approx(
        {step: score for step, score in hand.seen.items() if step >= 2}, abs=1e-6
    )
    alone = StabilityGap(tasks, weights="live", task_steps=[4])
    run(alone, EMA(decay=0.8, start_step=2))
    assert set(alone.record()["series"]) == {"live"}


def test_every_n_steps_and_the_end_of_a_task() -> None:
    gap = StabilityGap(loaders(), every_n_steps=3, task_steps=[5])
    run(gap)
    # Step 0, every third, the end of the first task, and the ends of the epoch of six batches and of the run.
    assert sorted(curve(gap, 0)) == [0, 3, 5, 6, 8]
    assert sorted(curve(gap, 1)) == [5, 6, 8]
    assert [entry["step"] for entry in gap.record()["summary"]["live"]] == [5, 8]


def test_one_fit_a_task_measures_what_one_fit_with_steps_does() -> None:
    tasks, module = loaders(), Classifier()
    one = StabilityGap(tasks, task_steps=[6])
    run(one, max_steps=12)
    each = StabilityGap(tasks)
    for _ in range(2):
        torch.manual_seed(3)
        trainer = run(each, module=module, max_steps=6)
    assert trainer.global_step == 6
    assert each.record()["switches"] == one.record()["switches"]
    assert curve(each, 0).keys() == curve(one, 0).keys()
    assert [entry["step"] for entry in each.record()["summary"]["live"]] == [6, 12]


def test_start_task_and_a_task_that_returns() -> None:
    gap = StabilityGap(loaders())

    class Ask(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (2, 5):
                gap.start_task(1 if trainer.global_step == 2 else 0)

    run(gap, Ask())
    assert gap.record()["switches"] == [{"task": 0, "step": 0}, {"task": 1, "step": 2}, {"task": 0, "step": 5}]
    assert [entry["task"] for entry in gap.record()["summary"]["live"]] == [0, 1, 0]


def test_validation_loaders_are_tasks_and_a_datamodule_names_them() -> None:
    tasks = loaders()
    gap = StabilityGap(task_steps=[3])
    trainer = Trainer(callbacks=[gap], **QUIET, devices=1, max_steps=5, limit_val_batches=1, num_sanity_val_steps=0)

    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    trainer.fit(Validated(), train(), tasks)
    assert [entry["task"] for entry in gap.record()["series"]["live"]] == [0, 1]

    class Tasks(LightningDataModule):
        task_names = ("first", "second")
        task_classes = ([0, 1], [2, 3])
        task_incremental = True

        @property
        def current_task(self) -> int:
            return int(self.trainer.global_step >= 3)

        def task_dataloaders(self) -> list[DataLoader]:
            return tasks

        @override
        def train_dataloader(self) -> DataLoader:
            return train()

    named = StabilityGap()
    run(named, data=Tasks())
    assert [entry["name"] for entry in named.record()["tasks"]] == ["first", "second"]
    among_all = StabilityGap(tasks, task_steps=[3])
    run(among_all)
    # The task is known at evaluation: only its own classes compete.
    assert all(curve(named, 0)[step] >= score for step, score in curve(among_all, 0).items())
    assert sum(curve(named, 0).values()) > sum(curve(among_all, 0).values())


def test_gradient_norms_are_those_of_the_whole_subset() -> None:
    tasks = loaders(count=11)

    class Norms(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, list[Tensor]] = {}

        @override
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            pl_module.eval()
            flat = []
            for loader in tasks:
                loss = pl_module.training_step(loader.dataset[:], 0)
                flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(pl_module.parameters()))]))
            pl_module.train()
            self.seen[trainer.global_step] = flat

    gap, hand = StabilityGap(tasks, gradients=True, batch_size=4, task_steps=[3]), Norms()
    run(gap, hand)
    found = gap.record()["gradients"]
    assert found["stability"][0] is None
    columns = zip(*(found[name] for name in ("plasticity", "stability", "cosine")), strict=True)
    rows = dict(zip(found["steps"], columns, strict=True))
    for step in (4, 8):
        old, new = hand.seen[step]
        cosine = float(nn.functional.cosine_similarity(old, new, dim=0))
        assert rows[step] == pytest.approx((float(new.norm()), float(old.norm()), cosine), rel=1e-4)


def test_a_subset_is_chosen_once_and_says_if_it_is_all(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Tensor] = []

    def note(module: LightningModule, batch: Any) -> Tensor:
        seen.append(batch[0])
        return per_sample(module, batch)

    with caplog.at_level(logging.INFO):
        run(StabilityGap(loaders(1, count=40), subset=7, score=note, higher_is_better=True))
    assert len(seen) > 8
    assert all(torch.equal(batch, seen[0]) for batch in seen)
    assert len(seen[0]) == 7
    assert "fewer than subset" not in caplog.text
    with caplog.at_level(logging.INFO):
        run(StabilityGap(loaders(1, count=40), subset=50))
    assert caplog.text.count("have 40 samples, fewer than subset=50: all are used") == 1


def test_samplers_that_choose_and_streams_are_respected() -> None:
    data = samples(30, (0, 1), 5)
    chosen = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler([1, 4, 9, 16, 25]))

    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield from iter(DataLoader(samples(30, (0, 1), 6), batch_size=7))

    gap = StabilityGap([chosen, DataLoader(Endless(), batch_size=None)], subset=10, task_steps=[2])
    run(gap)
    assert [entry["samples"] for entry in gap.record()["tasks"]] == [5, 10]


def test_samples_on_the_cpu_measure_the_same() -> None:
    tasks = loaders()
    one, other = StabilityGap(tasks, task_steps=[3]), StabilityGap(tasks, cache="cpu", task_steps=[3])
    run(one)
    run(other)
    assert one.record()["series"] == other.record()["series"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 is not a whole number of optimizer steps from 1 on"),
        ({"subset": 0}, "subset=0"),
        ({"windows": (1,)}, "windows=1"),
        ({"score": "acuracy"}, "not a score"),
        ({"score": "torch.no_such"}, "could not be imported"),
        ({"score": per_sample}, "Say so: higher_is_better"),
        ({"weights": "average"}, "weights='average' is unknown"),
        ({"cache": "disk"}, "cache='disk' is unknown"),
        ({"task_steps": [3, 2]}, "increasing"),
    ],
)
def test_values_that_are_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityGap(**settings)


def test_what_cannot_be_evaluated_is_said_before_training() -> None:
    data = samples(20, (0, 1), 5)
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cases = {
        r"Tasks 0 and 1 overlap in evaluation: 5 of": [Subset(data, range(10)), Subset(data, range(5, 15))],
        r"overlap in evaluation: 20 of 20": [data, TensorDataset(*data.tensors)],
        r"task 1 has no samples": [data, Subset(data, [])],
    }
    for message, sets in cases.items():
        with pytest.raises(ValueError, match=message):
            run(StabilityGap([DataLoader(part, batch_size=4) for part in sets]), module=module)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        run(StabilityGap(), module=module)
    with pytest.raises(ValueError, match="no submodule of Classifier"):
        run(StabilityGap(loaders(), logits="haed"), module=module)
    with pytest.raises(ValueError, match="needs EMA or BalancedEMA"):
        run(StabilityGap(loaders(), weights="both"), module=module)
    real = DataLoader(TensorDataset(torch.randn(4, FEATURES), torch.randn(4)), batch_size=2)
    with pytest.raises(ValueError, match="do not name a class"):
        run(StabilityGap([real]), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def fails_late(module: LightningModule, batch: Any) -> Tensor:
    if module.trainer.global_step == 3:
        raise RuntimeError("no such luck")
    value = per_sample(module, batch)
    return value * torch.nan if module.trainer.global_step == 5 else value


def test_a_failed_evaluation_does_not_end_training_unless_asked() -> None:
    gap = StabilityGap(loaders(1), score=fails_late, higher_is_better=True)
    with pytest.warns(RuntimeWarning, match="an evaluation failed .*no such luck") as caught:
        trainer = run(gap)
    assert trainer.global_step == 8
    assert len([one for one in caught if "StabilityGap" in str(one.message)]) == 1
    assert [step for step, score in curve(gap, 0).items() if score is None] == [3, 5]
    with pytest.raises(RuntimeError, match="no such luck"):
        run(StabilityGap(loaders(1), score=fails_late, higher_is_better=True, strict=True))


def test_a_score_that_is_no_number_is_said_once() -> None:
    def never(module: LightningModule, batch: Any) -> Tensor:
        return per_sample(module, batch) * torch.nan

    with pytest.warns(RuntimeWarning, match="score of task 0 is not a number"):
        run(StabilityGap(loaders(1), score=never, higher_is_better=True))
    with pytest.raises(RuntimeError, match="not a number"):
        run(StabilityGap(loaders(1), score=never, higher_is_better=True, strict=True))


def test_a_task_without_a_loader_is_said_at_once_where_it_is_known() -> None:
    with pytest.raises(ValueError, match="there are 2 tasks, and loaders for 1 of them"):
        run(StabilityGap(loaders(1), task_steps=[3]))


def test_a_task_without_a_loader_in_the_middle_is_said_and_left_out() -> None:
    gap = StabilityGap(loaders(1))

    class Ask(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                gap.start_task(1)

    with pytest.warns(RuntimeWarning, match="task 1 has no samples to evaluate on: of loaders there are 1"):
        run(gap, Ask())
    assert sorted(curve(gap, 0)) == list(range(9))
    assert gap.record()["summary"]["live"][0]["task"] == 0
