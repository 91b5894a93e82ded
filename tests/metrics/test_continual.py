"""The metrics as torchmetrics has them: one history, moved, saved, copied, synchronised and logged."""

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from metrics.continual_events import EVENTS, SHARED, WINDOWS, assert_values, expected, feed, numbers
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

import lightning_stable.metrics
from lightning_stable.functional import continual as functional
from lightning_stable.metrics import (
    AverageAccuracy,
    BackwardTransfer,
    ContinualMetrics,
    Forgetting,
    ForwardTransfer,
    GapDepth,
    GapRecovered,
    GapRecovery,
    LearningCurveArea,
    MinAccuracy,
    WindowedForgetting,
    WindowedPlasticity,
    WorstCaseAccuracy,
)
from lightning_stable.testing.harness import QUIET

LEVELS = (AverageAccuracy, MinAccuracy, WorstCaseAccuracy, LearningCurveArea)


# Each with what it takes and the name of its value.
SINGLE: list[tuple[type[Metric], dict[str, Any], str]] = [
    (AverageAccuracy, {}, "average_accuracy"),
    (BackwardTransfer, {}, "backward_transfer"),
    (Forgetting, {}, "forgetting"),
    (ForwardTransfer, {}, "forward_transfer"),
    (GapDepth, {}, "gap_depth"),
    (GapRecovered, {"recovery_share": 0.5}, "gap_recovered"),
    (GapRecovery, {"recovery_share": 0.5}, "gap_recovery"),
    (LearningCurveArea, {"steps": 2}, "learning_curve_area"),
    (MinAccuracy, {}, "min_accuracy"),
    (WindowedForgetting, {"window": 2}, "windowed_forgetting_2"),
    (WindowedPlasticity, {"window": 2}, "windowed_plasticity_2"),
    (WorstCaseAccuracy, {}, "worst_case_accuracy"),
]


def fed(events=EVENTS, **settings):
    return feed(ContinualMetrics(**{**SHARED, **settings}), events)


def test_the_collection_says_what_the_functions_say_after_each_event():
    metrics = ContinualMetrics(**SHARED)
    assert isinstance(metrics, MetricCollection)
    for count in range(len(EVENTS)):
        event = EVENTS[count]
        if event == "end":
            metrics.end_task(EVENTS[count - 1][0])
        else:
            metrics.update(event[2], event[0], event[1])
        assert_values(metrics.compute(), expected(EVENTS[: count + 1]))


@pytest.mark.parametrize(("kind", "settings", "name"), SINGLE, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_each_metric_alone_says_the_same(kind, settings, name, higher_is_better):
    metric = feed(kind(**settings, higher_is_better=higher_is_better))
    value = metric.compute()
    assert value.dtype == torch.float32
    assert value.shape == ()
    wanted = expected(higher_is_better=higher_is_better)[name]
    assert float(value) == pytest.approx(wanted, rel=1e-6, nan_ok=True)
    assert float(fed(higher_is_better=higher_is_better)[name].compute()) == pytest.approx(float(value), nan_ok=True)


def test_every_class_is_tested_and_exported():
    assert {kind.__name__ for kind, _, _ in SINGLE} | {"ContinualMetrics"} == set(lightning_stable.metrics.__all__)
    assert {name for _, _, name in SINGLE} == set(expected(windows=(2,)))
    with pytest.raises(AttributeError, match="has no attribute 'Forgeting'"):
        _ = lightning_stable.metrics.Forgeting


@pytest.mark.parametrize(("kind", "settings", "name"), SINGLE, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_better_is_told_right(kind, settings, name):
    worse = {"forgetting", "windowed_forgetting_2", "gap_depth", "gap_recovery"}
    assert kind(**settings).higher_is_better is (name not in worse)
    # A level of a loss is better where it is lower; a change of it is measured so that its meaning stays.
    lower = kind(**settings, higher_is_better=False)
    assert lower.higher_is_better is (kind not in LEVELS and name not in worse)
    assert pickle.loads(pickle.dumps(lower)).higher_is_better is lower.higher_is_better
    assert kind.full_state_update is True
    assert kind.is_differentiable is False


def test_scores_may_be_tensors_of_any_kind():
    metrics = ContinualMetrics(**SHARED)
    weight = torch.nn.Parameter(torch.tensor(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.update({0: weight, 1: torch.tensor([0.25], dtype=torch.bfloat16)}, torch.tensor(0), torch.tensor(3))
        metrics.end_task(0, {0: weight * 2})
    assert float(metrics.compute()["average_accuracy"]) == 0.5
    assert weight.grad is None


@pytest.mark.parametrize("make", [AverageAccuracy, lambda: ContinualMetrics(**SHARED)])
def test_forward_takes_the_scores_in_once_and_says_the_value_so_far(make):
    metric, other = make(), make()
    for task, step, scores in (event for event in EVENTS if event != "end"):
        said = metric(scores, task, step)
        other.update(scores, task, step)
        wanted = other.compute()
        if isinstance(said, dict):
            assert_values(said, numbers(wanted))
        else:
            assert said == wanted
            assert metric._forward_cache == wanted


def test_names_can_have_a_prefix_and_a_postfix():
    metrics = fed(prefix="live/", postfix="_now")
    assert numbers(metrics.compute())["live/forgetting_now"] == pytest.approx(expected()["forgetting"])
    assert metrics["live/forgetting_now"].compute() == metrics["forgetting"].compute()
    assert list(metrics.state_dict()) == ["average_accuracy.history"]


def test_the_parts_share_one_history_that_is_taken_in_and_computed_once(monkeypatch):
    calls = {"update": 0, "compute": 0}

    def counting(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    module = "lightning_stable.metrics._history."
    monkeypatch.setattr(f"{module}update_continual", counting("update", functional.update_continual))
    monkeypatch.setattr(f"{module}compute_continual", counting("compute", functional.compute_continual))
    metrics = fed()
    metrics.compute()
    for part in metrics.values():
        part.compute()
    assert calls == {"update": len(EVENTS) - 2, "compute": 1}
    assert len(metrics) == 10 + 2 * len(WINDOWS)


def test_a_part_is_read_and_not_fed():
    metrics = fed()
    part = metrics["forgetting"]
    for feed_it in (
        lambda: part.update({0: 0.5}, 2, 40),
        lambda: part({0: 0.5}, 2, 40),
        lambda: part.end_task(2),
        lambda: MetricCollection(metrics).update({0: 0.5}, 2, 40),
    ):
        with pytest.raises(ValueError, match="is part of a ContinualMetrics, whose parts share one history"):
            feed_it()
    assert_values(metrics.compute(), expected())


def test_reset_forgets_everything():
    metrics = fed()
    metrics.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics' own, of a value before the first update
        assert all(math.isnan(float(part.compute())) for part in metrics.values())
    assert all(math.isnan(value) for value in numbers(metrics.compute()).values())
    assert_values(feed(metrics).compute(), expected())
    single = feed(GapDepth())
    single.reset()
    assert not single.update_called
    assert float(feed(single).compute()) == pytest.approx(expected()["gap_depth"])


@pytest.mark.parametrize(
    "copied",
    [lambda m: m.clone(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["clone", "deep", "pickle"],
)
@pytest.mark.parametrize("make", [lambda: ContinualMetrics(**SHARED), WindowedPlasticity])
def test_a_copy_goes_on_by_itself(copied, make):
    metric, whole = feed(make(), EVENTS[:4]), feed(make())
    before = copy.deepcopy(metric.state_dict())
    other = copied(metric)
    feed(other, EVENTS[4:6])
    other.end_task(1)
    feed(other, EVENTS[7:])
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in other.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in metric.state_dict().items())
    assert str(other.compute()) == str(whole.compute())


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.set_dtype(torch.half),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.to("cpu", torch.float16),
    ],
    ids=["half", "bfloat16", "double", "set_dtype", "meta", "cpu"],
)
def test_no_conversion_of_the_module_touches_the_history(convert):
    module = torch.nn.ModuleDict({"metrics": fed(), "single": feed(Forgetting())})
    before = copy.deepcopy(module.state_dict())
    for part in module.values():
        convert(part)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert_values(module["metrics"].compute(), expected())
    module["metrics"].reset()
    assert_values(feed(module["metrics"]).compute(), expected())


def test_a_part_knows_its_device():
    metric = feed(Forgetting()).to("meta")
    assert metric.history.device.type == "meta"
    assert metric.compute().device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_metrics_on_a_gpu():
    on_gpu = [
        event if event == "end" else (*event[:2], {t: torch.tensor(score).cuda() for t, score in event[2].items()})
        for event in EVENTS
    ]
    metrics = feed(ContinualMetrics(**SHARED).to("cuda"), on_gpu)
    assert all(value.device.type == "cuda" for value in metrics.compute().values())
    assert_values(metrics.compute(), expected())
    other = ContinualMetrics(**SHARED).to("cuda")
    other.load_state_dict(metrics.state_dict())
    assert_values(other.to("cpu").compute(), expected())


@pytest.mark.parametrize("make", [lambda: ContinualMetrics(**SHARED), GapRecovery])
def test_a_checkpoint_goes_on_bit_by_bit_and_loads_safely(make):
    buffer = io.BytesIO()
    torch.save(feed(make(), EVENTS[:6]).state_dict(), buffer)
    resumed = make()
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert str(resumed.compute()) == str(feed(make(), EVENTS[:6]).compute())
    resumed.end_task(1)
    feed(resumed, EVENTS[7:])
    whole = feed(make())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert str(resumed.compute()) == str(whole.compute())


def test_a_history_of_other_settings_is_refused():
    words = r"ContinualMetrics: the history was kept with windows=\(2, 10\) and cannot go on with windows=\(3,\)"
    with pytest.raises(RuntimeError, match=words):
        ContinualMetrics(**{**SHARED, "windows": (3,)}).load_state_dict(fed().state_dict())
    words = r"LearningCurveArea: the history was kept with curve_steps=3 and cannot go on with curve_steps=4"
    with pytest.raises(RuntimeError, match=words):
        LearningCurveArea(4).load_state_dict(LearningCurveArea(3).state_dict())


def test_a_baseline_for_each_task_is_kept():
    settings = {"baseline": {1: 0.1, 2: 0.2}}
    metrics = fed(EVENTS[:4], **settings)
    other = ContinualMetrics(**{**SHARED, **settings})
    other.load_state_dict(metrics.state_dict())
    other.update({2: 0.7}, 2, 30)
    assert float(other.compute()["forward_transfer"]) == pytest.approx(((0.3 - 0.2) + (0.7 - 0.2)) / 2)


class Learner(LightningModule):
    """Learns a task an epoch and evaluates both at each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Linear(4, 1)
        self.metrics = ContinualMetrics(windows=(2, 3), higher_is_better=False, prefix="continual/")
        self.worst = MinAccuracy(higher_is_better=False)
        self.said: list[str] = []

    def scores(self) -> dict[int, torch.Tensor]:
        x = torch.ones(4).to(self.net.weight)
        return {task: (self.net(x * (task + 1)) - task).square().sum() for task in range(2)}

    def on_train_epoch_start(self) -> None:
        for metric in (self.metrics, self.worst):
            metric.update(self.scores(), self.current_epoch % 2, self.global_step)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.scores()[self.current_epoch % 2]

    def on_train_batch_end(self, *args: Any) -> None:
        for metric in (self.metrics, self.worst):
            metric.update(self.scores(), self.current_epoch % 2, self.global_step)
        self.log_dict(self.metrics.compute())
        self.log("worst", self.worst.compute())
        self.said.append(str(numbers(self.trainer.callback_metrics)))

    def on_train_epoch_end(self) -> None:
        for metric in (self.metrics, self.worst):
            metric.end_task(self.current_epoch % 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_module_that_holds_metrics_resumes_bit_by_bit(tmp_path, precision):
    settings = {**QUIET, "precision": precision}

    def fit(epochs, checkpoint=None):
        module = Learner()
        trainer = Trainer(max_epochs=epochs, **settings)
        trainer.fit(module, DataLoader(torch.zeros(4, 1)), ckpt_path=checkpoint)
        return module, trainer

    whole, trainer = fit(4)
    assert "continual/forgetting" in trainer.callback_metrics
    path = str(tmp_path / "half.ckpt")
    fit(2)[1].save_checkpoint(path)
    assert "metrics.average_accuracy.history" in torch.load(path, weights_only=True)["state_dict"]
    resumed, _ = fit(4, path)
    assert resumed.said == whole.said[8:]
    found = resumed.state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("feed_it", "words"),
    [
        (lambda m: m.update({}, 0), "scores={} holds no score"),
        (lambda m: m.update([0.5], 0), "holds no score"),
        (lambda m: m.update({0: float("nan")}, 0), "The score of task 0 is nan"),
        (lambda m: m.update({0: torch.ones(3)}, 0), "which is not one number"),
        (lambda m: m.update({0: "0.5"}, 0), "is '0.5', which is not one number"),
        (lambda m: m.update({0: 0.5}, -1), "The task -1 is not a whole number"),
        (lambda m: m.end_task(0), "Task 0 ends but was never evaluated"),
    ],
)
@pytest.mark.parametrize("make", [ContinualMetrics, Forgetting])
def test_bad_input_is_refused_by_name(make, feed_it, words):
    metric = make()
    with pytest.raises(ValueError, match=rf"^{type(metric).__name__}: .*({words})"):
        feed_it(metric)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ContinualMetrics(windows=(1,)), "ContinualMetrics: The window 1"),
        (lambda: ContinualMetrics(windows=10), "ContinualMetrics: windows=10"),
        (lambda: ContinualMetrics(curve_steps=0), "ContinualMetrics: curve_steps=0"),
        (lambda: ContinualMetrics(recovery_share=2), "ContinualMetrics: recovery_share=2"),
        (lambda: WindowedForgetting(1), "WindowedForgetting: The window 1"),
        (lambda: WindowedPlasticity(0), "WindowedPlasticity: The window 0"),
        (lambda: LearningCurveArea(0), "LearningCurveArea: curve_steps=0"),
        (lambda: GapRecovery(0), "GapRecovery: recovery_share=0"),
        (lambda: ForwardTransfer(float("inf")), "ForwardTransfer: baseline=inf"),
    ],
)
def test_bad_settings_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
