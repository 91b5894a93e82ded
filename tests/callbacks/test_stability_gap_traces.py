"""StabilityGap leaves no trace in training, and a run that was interrupted, split or resumed measures the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_stability_gap import CLASSES, Classifier, curve, loaders, per_sample, run, samples, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_stable.callbacks import EMA
from lightning_stable.callbacks.stability_gap import StabilityGap
from lightning_stable.data.task_stream import TaskStream
from lightning_stable.recipes.image_classifier import ImageClassifier
from lightning_stable.testing.harness import Stream, fit
from lightning_stable.testing.workers import Pair

# ---------------------------------------------------------------------------------------------------- no trace


class Manual(Classifier):
    """Steps its optimizer itself, and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("settings", [{"gradients": True}, {"score": "loss"}, {"logits": "head"}])
def test_a_training_step_that_would_train_is_never_run_beside(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="under manual optimisation that of Manual would train on them"):
        run(StabilityGap(loaders(), **settings), module=Manual())
    run(StabilityGap(loaders(), task_steps=[3]), module=Manual())


@pytest.mark.parametrize("settings", [{"gradients": True}, {"score": "loss"}, {"logits": "head"}])
def test_outputs_that_a_module_collects_are_those_of_training_alone(settings: dict[str, Any]) -> None:
    class Collects(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.outputs: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.outputs.append(loss.detach())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.outputs.append(self(batch[0]).sum())

    module = Collects()
    trainer = run(StabilityGap(loaders(), task_steps=[3], **settings), module=module)
    assert len(module.outputs) == trainer.global_step


class Counting(IterableDataset):
    """Goes on where it stopped."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        x, y = samples(40, (0, 1), 5).tensors
        while True:
            self.position += 1
            yield x[self.position % 40], y[self.position % 40]


def chosen_places() -> dict[str, DataLoader]:
    data = samples(30, (0, 1), 5)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    return {
        "some": DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(20), generator=generators[0])),
        "weighted": DataLoader(
            data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 30, 20, generator=generators[1])
        ),
        "stream": DataLoader(Counting(), batch_size=4),
    }


@pytest.mark.parametrize("kind", ["some", "weighted", "stream"])
def test_loaders_are_left_where_they_were(kind: str) -> None:
    def first() -> Tensor:
        return next(iter(loader))[0]

    loader = chosen_places()[kind]
    expected = first()
    loader = chosen_places()[kind]
    gap = StabilityGap([loader], subset=10)
    run(gap)
    assert torch.equal(first(), expected)


def test_a_weighted_sampler_gives_the_same_samples_each_time() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = samples(30, (0, 1), 5)
        gap = StabilityGap([DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 30, 20))], subset=10)
        run(gap, max_steps=2)
        found.append(sorted(gap._evaluation._subsets[0].fingerprints))
    assert found[0] == found[1]


def test_a_module_that_changes_its_batch_sees_fresh_samples_each_time() -> None:
    class Shifts(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.3))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Shifts()
    module.body[1] = nn.Identity()  # no statistics that move
    gap = StabilityGap(loaders(), task_steps=[3])
    run(gap, module=module)
    assert len(set(curve(gap, 0).values())) == 1


def test_what_a_train_method_does_is_done_again() -> None:
    class Merges(nn.Linear):
        """Like a low-rank layer that merges its factors for evaluation."""

        merged = False

        def train(self, mode: bool = True) -> "Merges":
            self.merged = not mode
            return super().train(mode)

    module = Classifier()
    module.head = Merges(8, CLASSES)
    run(StabilityGap(loaders(), task_steps=[3]), module=module)
    assert not module.head.merged


def test_augmentation_of_training_is_not_for_held_out_samples() -> None:
    class Augments(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return (batch[0] + torch.randn_like(batch[0]), batch[1]) if self.trainer.training else batch

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    plain, augmented = Classifier(), Augments()
    for module in (plain, augmented):
        module.body[1] = nn.Identity()
    tasks = loaders()
    one, other = StabilityGap(tasks), StabilityGap(tasks)
    run(one, module=plain, max_steps=1)
    run(other, module=augmented, max_steps=1)
    assert curve(other, 0)[0] == curve(one, 0)[0]


def test_samples_of_any_precision_can_be_told_apart() -> None:
    x, y = samples(12, (0, 1), 4).tensors
    halved = DataLoader(TensorDataset(x.bfloat16(), y), batch_size=4)

    def score(module: LightningModule, batch: Any) -> Tensor:
        return per_sample(module, (batch[0].float(), batch[1]))

    run(StabilityGap([halved], score=score, higher_is_better=True), max_steps=2)
    with pytest.raises(ValueError, match="overlap in evaluation"):
        run(
            StabilityGap(
                [halved, DataLoader(TensorDataset(x.bfloat16(), y), batch_size=4)], score=score, higher_is_better=True
            )
        )


# ---------------------------------------------------------------------------------------------------- the same record


class Interrupt(Callback):
    """Stops a run within an evaluation, once."""

    def __init__(self, at: int, score: Any) -> None:
        self.at, self.score = at, score
        self.done = False

    def __call__(self, module: LightningModule, batch: Any) -> Tensor:
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt
        return self.score(module, batch)


@pytest.mark.parametrize("at", [2, 9, 14, 15, 16, 17, 22])
def test_an_evaluation_that_was_interrupted_is_made_up_for(at: int, tmp_path: Path) -> None:
    """Whether the interruption comes in a step's evaluation or within a switch, the resumed record is the whole one."""

    def fit_stream(score: Any, ckpt: str | None = None) -> tuple[StabilityGap, Trainer]:
        torch.manual_seed(2)
        gap = StabilityGap(score=score, higher_is_better=True, picture=False)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=24,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[gap],
        )
        module = ImageClassifier(architecture="mlp", width=8)
        stream = TaskStream(tasks=5, epochs_per_task=1, batch_size=32, seed=1)
        try:
            trainer.fit(module, datamodule=stream, ckpt_path=ckpt)
        except SystemExit:  # what the host makes of an interruption
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")
        return gap, trainer

    expected = fit_stream(per_sample)[0].record()
    interrupted = Interrupt(at, per_sample)
    fit_stream(interrupted)
    assert interrupted.at <= 0
    again, _ = fit_stream(per_sample, ckpt=str(tmp_path / "stopped.ckpt"))
    found = again.record()
    assert found["switches"] == expected["switches"]
    assert found["summary"] == {"live": found["summary"]["live"]}
    assert [entry["steps"] for entry in found["series"]["live"]] == [
        entry["steps"] for entry in expected["series"]["live"]
    ]
    assert found["series"] == expected["series"]


@pytest.mark.parametrize("moment", ["validation end", "last step of an epoch"])
def test_a_checkpoint_at_the_end_of_an_epoch_has_its_evaluation(moment: str, tmp_path: Path) -> None:
    def one(saver: Callback | None, ckpt: str | None = None) -> StabilityGap:
        gap = StabilityGap(
            [DataLoader(Stream(2, seed=seed).dataset, batch_size=8) for seed in (5, 6)],
            every_n_steps=4,
            score="loss",
            task_steps=[7],
        )
        others = [] if saver is None else [saver]
        fit([gap, *others], validation=Stream(2, seed=5), max_steps=14, ckpt_path=ckpt, enable_checkpointing=True)
        return gap

    def saver() -> ModelCheckpoint:
        when = {"every_n_train_steps": 6} if moment != "validation end" else {"save_on_train_epoch_end": False}
        return ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)

    straight = one(saver())
    path = next(tmp_path.glob("step=6*.ckpt"))
    resumed = one(saver(), str(path))
    assert resumed.record() == straight.record()


def test_gaps_are_measured_from_the_weights_that_a_fit_begins_with() -> None:
    gap, module = StabilityGap(loaders(), score="loss"), Classifier()
    run(gap, module=module)
    before = curve(gap, 0)[8]
    with torch.no_grad():
        module.head.weight.zero_()
    run(gap, module=module)
    entry = next(one for one in gap.record()["series"]["live"] if one["task"] == 0)
    assert [step for step in entry["steps"] if step == 8] == [8, 8], "with the new weights before the first update"
    at = entry["steps"].index(8)
    assert entry["scores"][at] == before != entry["scores"][at + 1]


def test_nothing_is_evaluated_twice_where_the_weights_are_the_same() -> None:
    gap, module = StabilityGap(loaders()), Classifier()
    for _ in range(2):
        run(gap, EMA(decay=0.9, finish_with="live"), module=module)
    entry = next(one for one in gap.record()["series"]["live"] if one["task"] == 0)
    assert len(entry["steps"]) == len(set(entry["steps"]))


def test_steps_of_two_optimizers_are_not_lost() -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers()[: 1 if batch_idx % 2 else 2]:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers()[: 1 if batch_idx % 2 else 2]:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.body, self.head)]

    gap = StabilityGap(loaders(1))
    trainer = run(gap, module=Two(), max_steps=16)
    assert gap.state_dict()["log"]["done"] == trainer.global_step // 2


# ---------------------------------------------------------------------------------------------------- two processes


def _failing(module: LightningModule, batch: Any) -> Tensor:
    if module.global_rank == 1 and module.trainer.global_step == 2:
        raise RuntimeError("only here")
    return per_sample(module, batch)


def two_process_job(kind: str) -> dict[str, Any]:
    import warnings

    tasks, settings = loaders(), {"task_steps": [3]}
    if kind == "failing function":
        settings |= {"score": _failing, "higher_is_better": True}
    elif kind == "metric of a small task":
        tasks = [DataLoader(samples(1, (0, 1), 3), batch_size=1), loaders()[1]]
        settings["score"] = MulticlassAccuracy(CLASSES, average="micro")
    elif kind == "failing metric":
        settings |= {"score": FailingMetric(CLASSES, average="micro")}
    elif kind == "stream":
        tasks = [DataLoader(Sharded(), batch_size=4)]
        settings = {"subset": 10}
    gap = StabilityGap(tasks, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(gap, data=train(), devices=2, strategy="ddp", max_steps=5)
    record = gap.record()
    return {"series": record["series"], "tasks": record["tasks"]}


class FailingMetric(MulticlassAccuracy):
    """Fails on one process, in its second update."""

    calls = 0

    @override
    def update(self, *args: Any) -> None:
        import torch.distributed as dist

        type(self).calls += 1
        if dist.get_rank() == 1 and type(self).calls == 4:
            raise RuntimeError("only here")
        super().update(*args)


class Sharded(IterableDataset):
    """Gives each process samples of its own."""

    def __iter__(self) -> Any:
        import torch.distributed as dist

        x, y = samples(40, (0, 1, 2, 3), 9).tensors
        yield from zip(x[dist.get_rank() :: 2], y[dist.get_rank() :: 2], strict=True)


@pytest.mark.parametrize("kind", ["failing function", "metric of a small task", "failing metric", "stream"])
def test_two_processes_agree_and_do_not_wait_for_each_other(kind: str, workers: Pair) -> None:
    first, second = workers.run("test_stability_gap_traces:two_process_job", kind=kind)
    assert first == second
    values = [score for entry in first["series"]["live"] for score in entry["scores"]]
    assert all(score is None or 0 <= score <= 1 for score in values)
    assert (None in values) == kind.startswith("failing")
    if kind == "stream":
        assert first["tasks"][0]["samples"] == 20
