"""Local updates in real processes: validation, checkpoints, buffers, nodes, and workers that are slow."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles.local_update_twin import Inner, Outer, random_data, simulate
from strategies.groups import Group
from strategies.local_update_jobs import BATCHES

from lightning_stable.testing.harness import assert_same

JOBS = "strategies.local_update_jobs"
ADAMW = Inner("adamw", rates=(0.02, 0.008), weight_decay=0.05, factors=[0.95**step for step in range(40)])
SCHEMES = {
    "co2-paper": Outer("co2", delayed=True, outer_lr=0.7, outer_momentum=0.3, staleness_penalty="gap"),
    "co2-corrected": Outer("co2", delayed=True, variant="corrected", outer_lr=0.7, outer_momentum=0.3),
    "local_sgd-blocking": Outer("local_sgd"),
    "local_sgd-delayed": Outer("local_sgd", delayed=True, variant="corrected"),
    "slowmo-blocking": Outer("slowmo", outer_lr=0.8, outer_momentum=0.4),
    "slowmo-delayed": Outer("slowmo", delayed=True, outer_lr=0.8, outer_momentum=0.4),
    "diloco-blocking": Outer("diloco", outer_lr=0.7, outer_momentum=0.9),
    "diloco-delayed": Outer("diloco", delayed=True, variant="corrected", outer_lr=0.7, outer_momentum=0.9),
}
BUFFERS = ("norm.running_mean", "norm.running_var")
TRACKED = "norm.num_batches_tracked"
BLOCKING = SCHEMES["diloco-blocking"]
DELAYED = SCHEMES["co2-corrected"]


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    with Group(2) as group:
        yield group


@pytest.fixture(scope="module")
def three() -> Iterator[Group]:
    with Group(3) as group:
        yield group


@pytest.fixture(scope="module")
def nodes() -> Iterator[Group]:
    with Group(4, nodes=2) as group:
        yield group


def train(group, scheme, inner=ADAMW, **settings):
    outer = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return group.run(f"{JOBS}:train", outer=outer, inner=inner, **settings)


def close(found, wanted, tolerance=1e-12):
    np.testing.assert_allclose(found.numpy(), np.asarray(wanted), rtol=0, atol=tolerance)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_validation_sees_the_mean_and_leaves_no_trace(two, scheme):
    plain = train(two, scheme, steps=17, norm=True)
    validated = train(two, scheme, steps=17, norm=True, validate_every=2)
    # Two batches of validation after each second batch of training.
    moments = [step for step in range(2, 17, 2) for _ in range(2)]
    for run, untouched in zip(validated, plain, strict=True):
        assert len(run["validated"]) == len(moments)
        for seen, step in zip(run["validated"], moments, strict=True):
            own = [other["states"][step - 1] for other in validated]
            for name, value in seen.items():
                if value.is_floating_point():
                    close(value, (own[0][name] + own[1][name]) / 2)
        for what in ("states", "state", "optimizers"):
            assert_same(run[what], untouched[what], f"{what} with validation and without")
    assert_same(validated[0]["validated"], validated[1]["validated"], "what the two workers validate")
    drift = [s[0]["hidden.weight"] - s[1]["hidden.weight"] for s in zip(*(r["states"] for r in plain), strict=True)]
    assert max(float(apart.abs().max()) for apart in drift) > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_resumed_run_is_the_uninterrupted_one(two, tmp_path, scheme):
    # Step 8 is in the middle of a round, step 12 the end of one: with a mean on its way where it is delayed.
    for cut, length in ((8, 3), (12, 3), (9, [(0, 2), (7, 5)])):
        outer = replace(SCHEMES[scheme], local_steps=length)
        settings = {"steps": 19, "norm": True}
        whole = train(two, outer, save_at=(cut, 19), path=str(tmp_path / "whole"), **settings)
        first = str(tmp_path / f"whole-{cut}.ckpt")
        rest = train(two, outer, save_at=(19,), path=str(tmp_path / "rest"), resume=first, **settings)
        for one, other in zip(whole, rest, strict=True):
            assert other["steps"] == list(range(cut + 1, 20))
            assert_same(other["states"], one["states"][cut:], f"weights after step {cut}")
            for what in ("state", "optimizers"):
                assert_same(other[what], one[what], f"{what} at the end")
        saved = [torch.load(tmp_path / f"{name}-19.ckpt", weights_only=True) for name in ("whole", "rest")]
        for checkpoint in saved:
            # Times and the host's own count of where it is are not what is trained.
            checkpoint.pop("loops")
        assert_same(saved[1], saved[0], "the last checkpoint")
        assert any(name.endswith("Strategy") for name in saved[0])


@pytest.mark.parametrize("scheme", ["co2-paper", "slowmo-blocking"])
def test_resume_in_the_warm_up(two, tmp_path, scheme):
    outer = replace(SCHEMES[scheme], warmup_steps=6)
    whole = train(two, outer, steps=15, save_at=(4,), path=str(tmp_path / "whole"))
    rest = train(two, outer, steps=15, resume=str(tmp_path / "whole-4.ckpt"))
    for one, other in zip(whole, rest, strict=True):
        assert_same(other["states"], one["states"][4:], "weights after the cut")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_workers_end_equal(two, scheme):
    runs = train(two, scheme, steps=17, norm=True)
    assert_same(runs[1]["state"], runs[0]["state"], "the weights and buffers of both workers")
    assert_same(runs[1]["optimizers"], runs[0]["optimizers"], "the optimizers of both workers")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_is_what_training_goes_on_from(two, tmp_path, scheme):
    runs = train(two, scheme, steps=13, save_at=(8,), path=str(tmp_path / "at"), norm=True)
    saved = torch.load(tmp_path / "at-8.ckpt", weights_only=True)["state_dict"]
    weights = torch.cat([value.flatten() for name, value in saved.items() if name not in (*BUFFERS, TRACKED)])
    for run in runs:
        assert weights.shape == run["after_save"][8].shape
        assert torch.equal(weights, run["after_save"][8])


def test_a_checkpoint_of_two_workers_serves_three(two, three, tmp_path):
    train(two, "co2-paper", steps=8, save_at=(8,), path=str(tmp_path / "two"))
    runs = train(three, "co2-paper", steps=14, resume=str(tmp_path / "two-8.ckpt"))
    for run in runs:
        assert torch.isfinite(run["final"]).all()
        assert torch.equal(run["final"], runs[0]["final"])


def test_buffers_are_averaged_at_a_blocking_exchange(two):
    before = train(two, replace(BLOCKING, local_steps=50), steps=4, norm=True)
    after = train(two, BLOCKING, steps=4, norm=True)
    for name in BUFFERS:
        own = [run["states"][2][name] for run in before]
        assert not torch.allclose(own[0], own[1])
        for run in after:
            close(run["states"][2][name], (own[0] + own[1]) / 2)


def test_buffers_stay_a_workers_own_at_a_delayed_exchange_and_are_averaged_at_the_end(two):
    runs = train(two, DELAYED, steps=8, norm=True)
    for name in BUFFERS:
        for step in (3, 6, 8):
            own = [run["states"][step - 1][name] for run in runs]
            assert not torch.allclose(own[0], own[1])
        for run in runs:
            close(run["state"][name], (own[0] + own[1]) / 2)


@pytest.mark.parametrize("scheme", ["local_sgd-blocking", "co2-corrected"])
def test_a_final_merge_measures_the_buffers_on_the_averaged_weights(two, scheme):
    plain = train(two, scheme, steps=14, norm=True)
    merged = train(two, scheme, steps=14, norm=True, more={"final_merge": True})
    inputs = torch.cat([torch.tensor(x) for batches in random_data(2, BATCHES) for x, _ in batches])
    for run, without in zip(merged, plain, strict=True):
        assert torch.equal(run["final"], without["final"])
        assert_same(run["state"], merged[0]["state"], "the two workers")
        state = run["state"]
        entering = inputs @ state["hidden.weight"].T + state["hidden.bias"]
        close(state["norm.running_mean"], entering.mean(0), 1e-6)
        # Within batches of three samples each, with the mean of the batch.
        variances = entering.reshape(2 * BATCHES, 3, -1).var(1).mean(0)
        close(state["norm.running_var"], variances, 1e-6)


NODE_SCHEMES = {
    "co2-paper": Outer("co2", delayed=True, outer_lr=0.7, outer_momentum=0.3),
    "co2-corrected": DELAYED,
    "diloco-blocking": BLOCKING,
    "slowmo-delayed": SCHEMES["slowmo-delayed"],
}


@pytest.mark.parametrize("scheme", NODE_SCHEMES)
def test_a_node_is_one_worker_that_averages_gradients(nodes, tmp_path, scheme):
    outer = replace(NODE_SCHEMES[scheme], processes_per_worker=2, warmup_steps=2)
    inner = replace(ADAMW, clip=0.3, accumulate=2)
    settings = {"steps": 17, "save_at": (9,)}
    wanted = simulate(outer, inner, random_data(4, BATCHES), **settings)
    runs = train(nodes, outer, inner, nodes=2, path=str(tmp_path / "at"), **settings)
    for process, run in enumerate(runs):
        for step in range(17):
            close(run["after_step"][step], wanted.after_step[step][process], 1e-9)
        close(run["after_save"][9], wanted.after_save[9], 1e-9)
        close(run["final"], wanted.final, 1e-9)


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("scheme", ["co2-paper", "co2-corrected", "local_sgd-blocking"])
def test_a_slow_worker_holds_nobody_up_between_exchanges(two, tmp_path, scheme, slow):
    # The slow one stays in the first batch of the third round until the other one has begun the last batch of it: it
    # would wait in vain if anything tied them together in between.
    outer = replace(SCHEMES[scheme], local_steps=5)
    begun = two.run(
        f"{JOBS}:train_with_a_slow_rank",
        outer=outer,
        path=str(tmp_path / "begun"),
        slow=slow,
        at=11,
        until=15,
        patience=30.0,
        steps=21,
    )
    assert begun[slow] >= 15


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("scheme", ["co2-paper", "co2-corrected", "diloco-delayed"])
def test_a_delayed_exchange_leaves_a_worker_a_round_more(two, tmp_path, scheme, slow):
    outer = replace(SCHEMES[scheme], local_steps=5)
    begun = two.run(
        f"{JOBS}:train_with_a_slow_rank",
        outer=outer,
        path=str(tmp_path / "begun"),
        slow=slow,
        at=11,
        until=20,
        patience=30.0,
        steps=21,
    )
    assert begun[slow] >= 20


@pytest.mark.parametrize("head_every", [1, 2])
@pytest.mark.parametrize("scheme", ["co2-corrected", "diloco-blocking", "local_sgd-delayed"])
def test_manual_optimisation_counts_the_steps_of_the_busiest_optimizer(two, scheme, head_every):
    inner = Inner(rates=(0.05, 0.03), head_every=head_every)
    batches = 20
    wanted = simulate(SCHEMES[scheme], inner, random_data(2, BATCHES), steps=batches)
    # The host adds up the steps of both.
    steps = batches + batches // head_every
    runs = two.run(f"{JOBS}:train_manually", outer=SCHEMES[scheme], inner=inner, steps=steps)
    for process, run in enumerate(runs):
        assert len(run["after_step"]) == batches
        for step in range(batches):
            close(run["after_step"][step], wanted.after_step[step][process], 1e-9)
        close(run["final"], wanted.final, 1e-9)


@pytest.mark.parametrize(("steps", "told"), [(4, True), (5, False)])
def test_a_warm_up_that_takes_the_whole_run_is_told(two, steps, told):
    outer = Outer("co2", delayed=True, warmup_steps=4)
    said = two.run(f"{JOBS}:train_and_listen", outer=outer, inner=Inner(), steps=steps)[0]["said"]
    assert any("all of the run's 4 steps are synchronous" in line for line in said) == told, said


def test_a_number_of_local_steps_is_picked_and_told(two):
    outer = Outer("co2", local_steps="auto", delayed=True, outer_lr=0.7)
    runs = two.run(f"{JOBS}:train_and_listen", outer=outer, inner=Inner(), steps=60)
    told = {line for line in runs[0]["said"] if "CO2Strategy" in line and "local steps" in line}
    assert len(told) == 1, runs[0]["said"]
    # In the paper's variant the workers are equal after an exchange and at no other time.
    pairs = zip(runs[0]["after_step"], runs[1]["after_step"], strict=True)
    equal = [step for step, (one, other) in enumerate(pairs, start=1) if torch.equal(one, other)]
    gaps = {after - before for before, after in pairwise(equal[-4:])}
    assert len(gaps) == 1, equal
    assert re.search(rf"\b{gaps.pop()} local steps", told.pop())
