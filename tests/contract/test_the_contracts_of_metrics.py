"""The proof that the contracts bite on a metric, which is a part of the module and fed by the harness."""

import copy
from pathlib import Path

import pytest
import torch
from contract import broken_metrics
from contract.broken import row

from lightning_stable.testing import contracts
from lightning_stable.testing.contracts import MOMENTS, PRECISIONS, STEPS
from lightning_stable.testing.feeding import CHANGES, Feeder, scores
from lightning_stable.testing.harness import MODULES, Net, assert_same, fit
from lightning_stable.testing.workers import Pair

BITES = AssertionError
METRIC = row(broken_metrics.HonestMetric, observer=True)


def test_the_contracts_pass_an_honest_metric(tmp_path: Path) -> None:
    for moment in MOMENTS:
        contracts.check_resume(METRIC, tmp_path, moment=moment)
    contracts.check_inert(METRIC, tmp_path)
    contracts.check_exception(METRIC, "train", tmp_path)
    contracts.check_failing_test(METRIC, tmp_path)
    contracts.check_reuse(METRIC, tmp_path)
    for kind in MODULES:
        contracts.check_any_module(METRIC, kind, tmp_path)
    contracts.check_safe_load(METRIC, tmp_path)
    contracts.check_precision_company(METRIC, "bf16-true", tmp_path)


def test_the_contracts_bite_on_a_metric(tmp_path: Path) -> None:
    with pytest.raises(BITES, match="resumed run against uninterrupted run"):
        contracts.check_resume(row(broken_metrics.ForgetsItsScores), tmp_path)
    with pytest.raises(BITES, match="resumed with used objects"):
        contracts.check_resume(row(broken_metrics.AddsToWhatItHas), tmp_path)
    contracts.check_resume(row(broken_metrics.LosesDigits), tmp_path)
    with pytest.raises(BITES, match="resumed run against uninterrupted run"):
        contracts.check_precision_company(row(broken_metrics.LosesDigits), "bf16-true", tmp_path)
    with pytest.raises(BITES, match="a used object on another module"):
        contracts.check_reuse(row(broken_metrics.ResetsInPart), tmp_path)
    with pytest.raises(BITES, match="at its identity against nothing"):
        contracts.check_inert(row(broken_metrics.SplitsTiesByLot), tmp_path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        contracts.check_safe_load(row(broken_metrics.SavesItsScoresAsObjects), tmp_path)


def test_the_contracts_bite_on_a_metric_in_two_processes(workers: Pair) -> None:
    contracts.check_two_processes(METRIC, workers)
    with pytest.raises(BITES, match="two processes against one"):
        contracts.check_two_processes(row(broken_metrics.CountsEachProcess), workers)


def test_a_metric_that_is_fed_sees_each_optimizer_step_once(tmp_path: Path) -> None:
    for how in PRECISIONS:
        metric = broken_metrics.HonestMetric()
        run = fit([metric], max_steps=STEPS, **PRECISIONS[how])
        (feeder,) = [callback for callback in run.trainer.callbacks if isinstance(callback, Feeder)]
        steps = [event[-1] for event in feeder.events if event[0] == "scores"]
        # Once more before the first update, and before the first of each further task.
        assert steps == sorted([*range(STEPS + 1), *CHANGES])
        assert [event[1] for event in feeder.events if event[0] == "end"] == [0, 1]
        assert int(metric.count) == len(steps)
        assert list(feeder.said) == list(range(1, STEPS + 1))


def test_scores_are_taken_without_a_trace() -> None:
    module = Net(dropout=0.5)
    module.head.eval()
    torch.manual_seed(1)
    before = copy.deepcopy(module.state_dict())
    assert scores(module, range(2), 1) == scores(module, range(2), 5)
    assert [part.training for part in (module, module.body, module.head)] == [True, True, False]
    assert_same(dict(module.state_dict()), dict(before), "the module")
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(1)))
