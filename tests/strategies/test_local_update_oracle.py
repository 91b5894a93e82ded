"""Every local-update method against a simulation of its workers in NumPy that shares nothing with it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import local_update_twin as twin
from oracles.local_update_twin import Inner, Outer, random_data, simulate
from strategies.groups import Group
from strategies.local_update_jobs import BATCHES

TRAIN = "strategies.local_update_jobs:train"
# Double precision on both sides. The gap penalty's two norms are kept in single precision.
TOLERANCE = 1e-9
TOLERANCE_OF_NORMS = 1e-6
# Six rounds of three steps, and two steps of a seventh; three epochs of seven batches.
STEPS = 20


def _schemes():
    methods = {
        "local_sgd": {},
        "slowmo": {"outer_lr": 0.8, "outer_momentum": 0.4},
        "diloco": {"outer_lr": 0.7, "outer_momentum": 0.9},
    }
    schemes = {}
    for name, settings in methods.items():
        schemes[f"{name}-blocking"] = Outer(name, **settings)
        schemes[f"{name}-delayed-paper"] = Outer(name, delayed=True, **settings)
        schemes[f"{name}-delayed-corrected"] = Outer(name, delayed=True, variant="corrected", **settings)
    for variant in ("paper", "corrected"):
        schemes[f"co2-{variant}"] = Outer("co2", delayed=True, variant=variant, outer_lr=0.7, outer_momentum=0.3)
    return schemes


SCHEMES = _schemes()
DELAYED = {name: scheme for name, scheme in SCHEMES.items() if scheme.delayed}
CO2 = SCHEMES["co2-paper"]
INNERS = {
    "sgd": Inner(),
    "momentum": Inner(momentum=0.8, weight_decay=0.01, rates=(0.03, 0.012)),
    "adamw": Inner("adamw", rates=(0.02, 0.008), weight_decay=0.05),
}
FALLING = [0.9**step for step in range(STEPS + 1)]
# A rate of zero within rounds, at the end of rounds (steps 6, 9 and 12) and over a whole one.
WITH_ZEROS = [0.0 if step in (2, 5, 8, 9, 10, 11) else 0.97**step for step in range(STEPS + 1)]

CASES = {
    "gap penalty": (replace(CO2, staleness_penalty="gap"), INNERS["sgd"], {}),
    "gap penalty, corrected": (replace(SCHEMES["co2-corrected"], staleness_penalty="gap"), INNERS["adamw"], {}),
    "gap penalty, checkpoints": (
        replace(CO2, staleness_penalty="gap", outer_momentum=0.5),
        INNERS["momentum"],
        {"save_at": (4, 9)},
    ),
    "constant penalty": (replace(CO2, staleness_penalty=1.7), INNERS["sgd"], {}),
    "clipped outer momentum": (replace(CO2, momentum_clip=0.02), INNERS["momentum"], {}),
    "clipped outer momentum, gap": (
        replace(SCHEMES["co2-corrected"], momentum_clip=0.02, staleness_penalty="gap"),
        INNERS["sgd"],
        {},
    ),
    "clip without outer momentum": (replace(CO2, momentum_clip=0.02, outer_momentum=0.0), INNERS["sgd"], {}),
    "no outer momentum": (replace(CO2, outer_momentum=0.0, outer_lr=0.5), INNERS["adamw"], {}),
    "one step a round": (replace(CO2, local_steps=1), INNERS["momentum"], {}),
    "one step a round, blocking": (replace(SCHEMES["slowmo-blocking"], local_steps=1), INNERS["sgd"], {}),
    "a round longer than the run": (replace(CO2, local_steps=50), INNERS["adamw"], {}),
    "one checkpoint in the only round": (
        replace(SCHEMES["diloco-blocking"], local_steps=50),
        INNERS["adamw"],
        {"save_at": (7,)},
    ),
    "run as long as its rounds": (replace(CO2, local_steps=4), INNERS["sgd"], {}),
    "run as long as its rounds, blocking": (replace(SCHEMES["diloco-blocking"], local_steps=4), INNERS["sgd"], {}),
    "two checkpoints in a row": (CO2, INNERS["adamw"], {"save_at": (6, 7, 20)}),
    "falling rate, slowmo": (SCHEMES["slowmo-blocking"], replace(INNERS["sgd"], factors=FALLING), {}),
    "falling rate, slowmo delayed": (SCHEMES["slowmo-delayed-paper"], replace(INNERS["sgd"], factors=FALLING), {}),
    "falling rate, slowmo corrected, checkpoints": (
        SCHEMES["slowmo-delayed-corrected"],
        replace(INNERS["adamw"], factors=FALLING),
        {"save_at": (6, 8, 12)},
    ),
    "rate of zero, slowmo": (SCHEMES["slowmo-blocking"], replace(INNERS["sgd"], factors=WITH_ZEROS), {}),
    "rate of zero, slowmo delayed": (SCHEMES["slowmo-delayed-paper"], replace(INNERS["sgd"], factors=WITH_ZEROS), {}),
    # The mean that is under way at the end comes from a round that moved.
    "rate of zero at the end, slowmo delayed": (
        SCHEMES["slowmo-delayed-paper"],
        replace(INNERS["sgd"], factors=[max(0.0, 1 - step / (STEPS - 1)) for step in range(STEPS + 1)]),
        {},
    ),
    "checkpoint in the warm-up": (
        replace(CO2, warmup_steps=5),
        INNERS["adamw"],
        {"save_at": (2, 5)},
    ),
    "warm-up longer than the run": (replace(CO2, warmup_steps=90), replace(INNERS["adamw"], clip=0.3), {}),
}


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    with Group(2) as group:
        yield group


@pytest.fixture(scope="module")
def three() -> Iterator[Group]:
    with Group(3) as group:
        yield group


def check(group, outer, inner, path, *, steps=STEPS, save_at=()):
    """Train for real and in the twin, and compare every worker after every step."""
    wanted = simulate(outer, inner, random_data(group.size, BATCHES), steps=steps, save_at=save_at)
    found = group.run(TRAIN, outer=outer, inner=inner, steps=steps, save_at=save_at, path=str(path / "at"))
    tolerance = TOLERANCE_OF_NORMS if outer.staleness_penalty == "gap" else TOLERANCE
    for process, run in enumerate(found):
        assert run["steps"] == list(range(1, steps + 1))
        for step in range(1, steps + 1):
            close(run["after_step"][step - 1], wanted.after_step[step - 1][process], tolerance, f"{process} at {step}")
        assert sorted(run["after_save"]) == list(save_at)
        for step in save_at:
            close(run["after_save"][step], wanted.after_save[step], tolerance, f"{process} saved at {step}")
        close(run["final"], wanted.final, tolerance, f"{process} at the end")
        assert torch.equal(run["final"], found[0]["final"])
    return wanted


def close(found, wanted, tolerance, where):
    gap = np.abs(found.numpy() - wanted).max()
    assert gap <= tolerance, f"process {where}: {gap:.3g} from the simulation"


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_workers_do_as_the_simulation(two, tmp_path, scheme, inner):
    wanted = check(two, SCHEMES[scheme], INNERS[inner], tmp_path)
    assert len(wanted.boundaries) == 6
    # The workers disagree within a round, or nothing is tested.
    assert np.abs(wanted.after_step[-1][0] - wanted.after_step[-1][1]).max() > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoints_are_round_boundaries(two, tmp_path, scheme):
    # In a round, at the end of one, and in the one after.
    check(two, SCHEMES[scheme], INNERS["adamw"], tmp_path, save_at=(5, 8, 10))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_synchronous_steps_first(two, tmp_path, scheme):
    # So tight that a clip before the mean would be another one.
    inner = replace(INNERS["adamw"], clip=0.3)
    check(two, replace(SCHEMES[scheme], warmup_steps=4), inner, tmp_path, steps=23)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_lengths_may_follow_a_schedule(two, tmp_path, scheme):
    outer = replace(SCHEMES[scheme], local_steps=[(0, 2), (5, 4), (13, 1)])
    wanted = check(two, outer, INNERS["momentum"], tmp_path)
    assert wanted.boundaries == [2, 4, 6, 10, 14, 15, 16, 17, 18, 19, 20]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accumulation_and_clipping_act_on_a_workers_own_gradients(two, tmp_path, scheme):
    # Seven batches by two: the last step of an epoch has one batch.
    check(two, SCHEMES[scheme], replace(INNERS["momentum"], accumulate=2, clip=0.25), tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_single_settings(two, tmp_path, case):
    outer, inner, more = CASES[case]
    check(two, outer, inner, tmp_path, **more)


@pytest.mark.parametrize("scheme", DELAYED)
def test_everything_at_once(two, tmp_path, scheme):
    outer = replace(DELAYED[scheme], local_steps=[(0, 3), (9, 2)], warmup_steps=3)
    if outer.method == "co2":
        outer = replace(outer, staleness_penalty="gap", momentum_clip=0.05)
    inner = replace(INNERS["adamw"], accumulate=3, clip=0.4, factors=FALLING)
    check(two, outer, inner, tmp_path, save_at=(2, 8, 13))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_three_workers_do_as_the_simulation(three, tmp_path, scheme):
    check(three, replace(SCHEMES[scheme], warmup_steps=1), INNERS["adamw"], tmp_path, save_at=(9,))


@pytest.mark.parametrize("scheme", ["co2-paper", "diloco-blocking"])
def test_movements_in_bfloat16_stay_near_the_simulation(two, scheme):
    outer, inner = SCHEMES[scheme], INNERS["sgd"]
    wanted = simulate(outer, inner, random_data(2, BATCHES), steps=STEPS)
    runs = two.run(TRAIN, outer=outer, inner=inner, steps=STEPS, more={"comm_dtype": "bfloat16"})
    assert torch.equal(runs[0]["final"], runs[1]["final"])
    # Eight bits of each movement are kept.
    gap = np.abs(runs[0]["final"].numpy() - wanted.final).max()
    assert 1e-9 < gap < 0.05 * np.abs(wanted.final - twin.initial_weights()).max()


# What follows shows that the simulation itself is right.


def test_the_simulation_has_the_gradients_of_autograd():
    vector = twin.initial_weights()
    inputs, targets = random_data(1, 1)[0][0]
    weights = torch.tensor(vector, requires_grad=True)
    parts, start = [], 0
    for shape in twin.SIZES.values():
        count = int(np.prod(shape))
        parts.append(weights[start : start + count].reshape(shape))
        start += count
    hidden = torch.tanh(torch.tensor(inputs) @ parts[0].T + parts[1])
    torch.nn.functional.mse_loss(hidden @ parts[2].T + parts[3], torch.tensor(targets)).backward()
    np.testing.assert_allclose(twin.gradient(vector, inputs, targets), weights.grad.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("inner", [*INNERS.values(), replace(INNERS["adamw"], clip=0.1)])
def test_the_simulation_has_the_inner_optimizers_of_torch(inner):
    rng = np.random.default_rng(3)
    weights = rng.normal(size=twin.ENTRIES)
    split = twin.HIDDEN_ENTRIES
    parts = [torch.nn.Parameter(torch.tensor(part)) for part in (weights[:split], weights[split:])]
    groups = [{"params": [part], "lr": rate} for part, rate in zip(parts, inner.rates, strict=True)]
    theirs = (
        torch.optim.AdamW(groups, weight_decay=inner.weight_decay)
        if inner.name == "adamw"
        else torch.optim.SGD(groups, momentum=inner.momentum, weight_decay=inner.weight_decay)
    )
    ours = twin.InnerOptimizer(inner)
    for _ in range(5):
        grad = rng.normal(size=twin.ENTRIES)
        parts[0].grad, parts[1].grad = torch.tensor(grad[:split]), torch.tensor(grad[split:])
        if inner.clip is not None:
            torch.nn.utils.clip_grad_norm_(parts, inner.clip)
        theirs.step()
        weights = ours.step(weights, twin.clipped(grad, inner.clip), inner.rate(0))
    np.testing.assert_allclose(weights, torch.cat(parts).detach().numpy(), rtol=0, atol=1e-13)


def test_the_simulation_has_torchs_nesterov_sgd_as_outer_step_of_diloco():
    rng = np.random.default_rng(4)
    rule = twin.OuterOptimizer(Outer("diloco", outer_lr=0.7, outer_momentum=0.9))
    anchor = rng.normal(size=twin.ENTRIES)
    weights = torch.nn.Parameter(torch.tensor(anchor))
    theirs = torch.optim.SGD([weights], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(4):
        delta = rng.normal(size=twin.ENTRIES)
        anchor = rule.step(anchor, delta, 0.1)
        weights.grad = torch.tensor(delta)
        theirs.step()
    np.testing.assert_allclose(anchor, weights.detach().numpy(), rtol=0, atol=1e-13)


def test_the_simulation_of_rounds_of_one_step_is_synchronous_sgd():
    data = random_data(3, BATCHES)
    rounds = simulate(Outer("local_sgd", local_steps=1), Inner(), data, steps=12)
    together = simulate(Outer("local_sgd", warmup_steps=12), Inner(), data, steps=12)
    np.testing.assert_allclose(rounds.final, together.final, rtol=0, atol=1e-13)


def test_the_simulation_of_workers_that_agree_is_plain_training_where_own_rounds_are_kept():
    data = random_data(1, BATCHES) * 3
    inner = INNERS["momentum"]
    kept = simulate(Outer("local_sgd", delayed=True, variant="corrected"), inner, data, steps=STEPS, save_at=(7, 9))
    plain = simulate(Outer("local_sgd", warmup_steps=STEPS), inner, data[:1], steps=STEPS)
    np.testing.assert_allclose(kept.final, plain.final, rtol=0, atol=1e-13)


def test_the_simulation_of_a_delayed_mean_by_hand():
    # One worker, rounds of one step: each start is the last one less the step that was taken from the start before.
    data = random_data(1, BATCHES)
    found = simulate(Outer("local_sgd", local_steps=1, delayed=True), Inner(rates=(0.1, 0.1)), data, steps=6)
    starts = [twin.initial_weights(), twin.initial_weights()]
    for step in range(6):
        starts.append(starts[-1] - 0.1 * twin.gradient(starts[-2], *data[0][step]))
    for step, weights in enumerate(found.after_step):
        np.testing.assert_allclose(weights[0], starts[step + 1], rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.final, starts[-1], rtol=0, atol=1e-14)


def test_the_simulation_of_the_gap_penalty_by_hand():
    # Displacements of 1, then halved by a penalty of 2 as the longest so far, then between the two.
    rule = twin.OuterOptimizer(Outer("co2", delayed=True, staleness_penalty="gap"))
    unit = np.eye(twin.ENTRIES)[0]
    anchors = [np.zeros(twin.ENTRIES)]
    for _ in range(4):
        anchors.append(rule.step(anchors[-1], unit, 0.1))
    moved = [float((before - after)[0]) for before, after in pairwise(anchors)]
    np.testing.assert_allclose(moved, [1.0, 1 / 2, 1 / 1.5, 1 / (1 + 1 / 1.5)], rtol=1e-12)
