"""The oracle of the row of StabilityGap: the scores, from recorded weights, and all that follows from them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.continual_checks import SWITCHES, TASK_STEPS, Named, joined, task_of
from lightning.pytorch import LightningModule
from oracles import gap_twin
from oracles.replay import Replay as Again
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stable.callbacks import EMA, StabilityGap
from lightning_stable.testing.harness import Net, Run, assert_same, fit
from lightning_stable.testing.rows import STEPS
from lightning_stable.testing.streams import BATCHES, Stream


def held_out() -> list[DataLoader]:
    """Return the held-out samples of three tasks."""
    return [DataLoader(Stream(2, seed=seed).dataset, batch_size=5) for seed in (21, 22, 23)]


def closeness(module: LightningModule, batch: tuple[Tensor, ...]) -> Tensor:
    """Return for each sample minus its squared error: a score, the higher the better."""
    x, y = batch
    # There is a module that takes more features, and gives more outputs.
    width = next(module.parameters()).shape[1]
    return -(module(nn.functional.pad(x, (0, width - x.shape[1]))).mean(1, keepdim=True) - y).square().flatten()


SUBSET = 6
WATCHED: dict[str, Any] = {
    "every_n_steps": 2,
    "subset": SUBSET,
    "score": closeness,
    "higher_is_better": True,
    "windows": [3, 10],
    "directory": "gap",
    "picture": False,
    "task_steps": TASK_STEPS,
}

# Watches more, through the module's own training step.
LOSS: dict[str, Any] = {**WATCHED, "score": "loss", "higher_is_better": None, "gradients": True, "every_n_steps": 1}


def stability_gap(run: Run, plugin: StabilityGap) -> None:
    record = plugin.record()
    epoch = -(-BATCHES // run.trainer.accumulate_grad_batches)
    moments = sorted({*range(0, STEPS + 1, 2), *TASK_STEPS, *range(epoch, STEPS + 1, epoch), STEPS})
    assert record["switches"] == [{"task": task, "step": step} for task, step in enumerate(SWITCHES)]
    assert [entry["samples"] for entry in record["tasks"]] == [SUBSET] * len(SWITCHES)

    curves, untrained = _curves(record, "live"), {}
    expected = _all_scores(run, _live(run))
    for task, curve in curves.items():
        steps = [step for step, _ in curve]
        assert steps == [step for step in moments if step >= SWITCHES[task]], f"task {task} was evaluated at {steps}"
        scores = torch.stack([expected[step][task] for step in steps])
        subset = _find_subset(torch.tensor([score for _, score in curve]), scores, _tolerance(run))
        untrained[task] = float(expected[0][task][subset].mean())
    _assert_summary(record, curves, untrained)
    assert json.loads(Path("gap/stability_gap.json").read_text()) == json.loads(json.dumps(record))
    for order in (1, -1):
        _assert_everything_at_every_step(run, order)


def _assert_everything_at_every_step(run: Run, order: int) -> None:
    """Fail unless all samples at every step give the scores of both sets of weights, and the gradients.

    Args:
        run: Whose kind of accumulation and precision a further run has.
        order: 1 for the average's callback first, -1 for the other one.
    """
    whole = {**WATCHED, "every_n_steps": 1, "subset": 1000, "gradients": True, "directory": None}
    plugin = StabilityGap(loaders=held_out(), **whole)
    average = EMA(decay=0.8, validate_with="live", finish_with="live")
    done = _again_beside(run, [average, plugin][::order])
    assert_same(done.module.state_dict(), run.module.state_dict(), "a run watched in another way")
    record, live = plugin.record(), _live(done)
    for name, weights in (("live", live), ("ema", _averages(live, 0.8))):
        expected = _all_scores(done, weights)
        for task, curve in _curves(record, name).items():
            wanted = [(step, float(expected[step][task].mean())) for step in range(SWITCHES[task], STEPS + 1)]
            assert [step for step, _ in curve] == [step for step, _ in wanted], f"{name}, task {task}"
            scores = [score for _, score in wanted]
            assert [score for _, score in curve] == pytest.approx(scores, abs=_tolerance(run)), f"{name}, task {task}"
    _assert_gradient_parts(done, record["gradients"])


def _curves(record: dict[str, Any], weights: str) -> dict[int, list[tuple[int, float]]]:
    series = record["series"][weights]
    return {entry["task"]: list(zip(entry["steps"], entry["scores"], strict=True)) for entry in series}


def _tolerance(run: Run) -> float:
    return 2e-2 if run.trainer.precision == "bf16-mixed" else 1e-4


def _assert_summary(record: dict[str, Any], curves: dict[int, Any], untrained: dict[int, float]) -> None:
    """Fail unless the metrics at the end of each task are those of the curves, by brute force."""
    for task, (entry, end) in enumerate(zip(record["summary"]["live"], [*TASK_STEPS, STEPS], strict=True)):
        seen = {number: curves[number] for number in range(task + 1)}
        metrics = gap_twin.summary(seen, SWITCHES[: task + 1], end, WATCHED["windows"], untrained)
        wanted = {"task": task, "step": end, **metrics}
        assert entry.keys() == wanted.keys()
        assert {name for name, value in entry.items() if value is None} == {n for n, v in wanted.items() if v is None}
        for name, value in entry.items():
            assert value == wanted[name] or value == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), (name, entry)


def _again_beside(run: Run, plugins: list[Any]) -> Run:
    """Fit once more with several plugins."""
    return fit(
        plugins,
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        accumulate_grad_batches=run.trainer.accumulate_grad_batches,
        gradient_clip_val=run.trainer.gradient_clip_val,
        precision=run.trainer.precision,
    )


def _live(run: Run) -> list[Named]:
    """Return the weights after every number of steps."""
    return [run.steps[0].before, *(step.weights for step in run.steps)]


def _averages(live: list[Named], decay: float) -> list[Named]:
    """Return the average after every number of steps."""
    shadows = [{name: value.double() for name, value in live[0].items()}]
    for weights in live[1:]:
        shadows.append({name: decay * shadows[-1][name] + (1 - decay) * value for name, value in weights.items()})
    return [{name: value.float() for name, value in shadow.items()} for shadow in shadows]


def _at_every_step(run: Run, weights: list[Named]) -> Iterator[tuple[int, Net, torch.autocast]]:
    """Yield for every number of steps the module in eval mode with these weights, and the run's precision."""
    again = Again(run)

    def module(number: int) -> Net:
        net = Net()
        net.load_state_dict({**weights[number], **dict(again.module.named_buffers())})
        return net.eval()

    for replayed in again:
        yield replayed.number, module(replayed.number), again.precision()
    yield STEPS, module(STEPS), again.precision()


def _all_scores(run: Run, weights: list[Named]) -> list[list[Tensor]]:
    """Return after every number of steps the score of every held-out sample of each task."""
    found = []
    for _, module, precision in _at_every_step(run, weights):
        with torch.no_grad(), precision:
            found.append([closeness(module, loader.dataset.tensors).double() for loader in held_out()])
    return found


def _assert_gradient_parts(run: Run, found: dict[str, list[Any]]) -> None:
    """Fail unless the gradients of the present and of the earlier tasks' samples are as long, and lie, as they say."""
    tasks, wanted = [loader.dataset.tensors for loader in held_out()], {}
    for step, module, precision in _at_every_step(run, _live(run)):
        task = task_of(step)
        if task:
            parts = []
            for batch in (tasks[task], joined(tasks[:task])):
                with precision:
                    loss = module.loss(batch)
                gradients = torch.autograd.grad(loss, list(module.parameters()))
                parts.append(torch.cat([gradient.double().flatten() for gradient in gradients]))
            new, old = parts
            wanted[step] = [float(new.norm()), float(old.norm()), float(new @ old / new.norm() / old.norm())]
    kinds = ("plasticity", "stability", "cosine")
    values = dict(zip(found["steps"], zip(*(found[kind] for kind in kinds), strict=True), strict=True))
    for step, expected in wanted.items():
        assert list(values[step]) == pytest.approx(expected, rel=5e-2 if _tolerance(run) > 1e-3 else 1e-3), step


def _find_subset(found: Tensor, scores: Tensor, tolerance: float) -> Tensor:
    """Return the one set of samples the mean over which gives every score of a curve; fail if there is none.

    Args:
        found: Shape (evaluations,).
        scores: Of every sample, of shape (evaluations, samples).
        tolerance: How far a score may be away.
    """
    chosen = torch.tensor(list(itertools.combinations(range(scores.shape[1]), SUBSET)))
    away = (scores[:, chosen].mean(-1) - found.double()[:, None]).abs().amax(0)
    assert float(away.min()) <= tolerance, f"no {SUBSET} samples score so; the nearest are {away.min():.3g} off"
    return chosen[away.argmin()]
