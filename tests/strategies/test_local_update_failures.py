"""Local updates that go wrong: workers that die, stall or raise, and bad input."""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision
from oracles.local_update_twin import Inner, Outer, random_data, simulate
from strategies.groups import Group
from strategies.local_update_jobs import BATCHES, Batches, Said, TwinNet, vector

from lightning_stable import strategies
from lightning_stable.testing.harness import QUIET, fit

JOBS = "strategies.local_update_jobs"
INNER = Inner("adamw", rates=(0.02, 0.008))
SCHEMES = {
    "co2": Outer("co2", delayed=True, variant="corrected", outer_lr=0.7, outer_momentum=0.3),
    "local_sgd": Outer("local_sgd"),
}


@pytest.fixture
def two() -> Iterator[Group]:
    """Two processes for one test: no other test's group of processes, with another time-out, is left in them."""
    with Group(2) as group:
        group.run(f"{JOBS}:ready")
        yield group


@pytest.fixture(scope="module")
def two_for_errors() -> Iterator[Group]:
    with Group(2) as group:
        yield group


def names_rank_and_round(message, rank, finished, scheme):
    assert re.search(rf"\brank {rank} did not come\b", message), message
    # A delayed exchange may let the others finish the round in which one was lost.
    allowed = (finished, finished + 1) if SCHEMES[scheme].delayed else (finished,)
    found = re.search(r"The last finished round is (\d+)", message)
    assert found, message
    assert int(found[1]) in allowed, message


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_death_of_one_process_ends_the_other_and_the_checkpoint_serves(two, tmp_path, scheme):
    outer = SCHEMES[scheme]
    settings = {"outer": outer, "inner": INNER, "steps": 20}
    # Rounds of three steps: four are over at step 12.
    two.start(
        f"{JOBS}:train_and_fail",
        who=1,
        at=12,
        how="exit",
        timeout=60.0,
        save_at=(6,),
        path=str(tmp_path / "at"),
        **settings,
    )
    survivor, dead = two.collect(120.0)
    assert dead.outcome == "died"
    assert survivor.outcome == "failed", survivor
    assert survivor.seconds < 30.0, survivor.value
    names_rank_and_round(survivor.value, 1, 4, scheme)
    # New processes go on from the checkpoint.
    runs = two.run(f"{JOBS}:train", resume=str(tmp_path / "at-6.ckpt"), **settings)
    wanted = simulate(outer, INNER, random_data(2, BATCHES), steps=20, save_at=(6,))
    for run in runs:
        assert run["steps"][0] == 7
        np.testing.assert_allclose(run["final"].numpy(), wanted.final, rtol=0, atol=1e-9)


@pytest.mark.parametrize("who", [0, 2])
def test_the_death_of_one_of_three_processes_ends_the_others(tmp_path, who):
    # The first one that notices ends too, so the last one may name it instead.
    with Group(3) as three:
        three.run(f"{JOBS}:ready")
        three.start(
            f"{JOBS}:fail_as_a_program",
            path=str(tmp_path / "error"),
            outer=SCHEMES["co2"],
            inner=INNER,
            steps=30,
            who=who,
            at=7,
            how="exit",
            timeout=60.0,
        )
        answers = three.collect(120.0)
    told = []
    for rank, answer in enumerate(answers):
        assert answer.outcome == "died"
        assert answer.seconds < 30.0
        if rank != who:
            told.append((tmp_path / f"error-{rank}").read_text())
            # On a busy machine a rank that is still computing is missed too.
            assert re.search(r"ranks? [\d, ]+ did not come", told[-1]), told[-1]
    assert any(re.search(rf"ranks? [\d, ]*{who}[\d, ]* did not come", text) for text in told), told
    assert all(re.search(r"The last finished round is [23]\b", text) for text in told), told


@pytest.mark.parametrize(("scheme", "who"), [("co2", 0), ("co2", 1), ("local_sgd", 0)])
def test_a_stalled_process_ends_the_other_after_the_timeout(two, scheme, who):
    two.start(
        f"{JOBS}:train_and_fail",
        outer=SCHEMES[scheme],
        inner=INNER,
        steps=30,
        who=who,
        at=7,
        how="stall",
        timeout=6.0,
    )
    answers = two.collect(60.0, ranks=[1 - who])
    assert answers[who].outcome == "silent"
    assert answers[1 - who].outcome == "failed"
    names_rank_and_round(answers[1 - who].value, who, 2, scheme)
    assert answers[1 - who].seconds < 30.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_exception_on_one_rank_ends_both(two, scheme):
    two.start(
        f"{JOBS}:train_and_fail",
        outer=SCHEMES[scheme],
        inner=INNER,
        steps=30,
        who=1,
        at=7,
        how="raise",
        timeout=6.0,
    )
    other, raising = two.collect(60.0)
    assert "deliberate failure" in raising.value
    assert other.outcome == "failed"
    names_rank_and_round(other.value, 1, 2, scheme)
    assert other.seconds < 30.0


def one_process_data():
    return Batches(random_data(1, BATCHES)[0])


CLASSES = {
    name: getattr(strategies, name) for name in ("CO2Strategy", "LocalSGDStrategy", "SlowMoStrategy", "DiLoCoStrategy")
}
WITH_MOMENTUM = ("CO2Strategy", "SlowMoStrategy", "DiLoCoStrategy")
BAD = [
    {"local_steps": 0},
    {"local_steps": -3},
    {"local_steps": []},
    {"local_steps": [(5, 2)]},
    {"local_steps": [(0, 2), (0, 3)]},
    {"local_steps": [(0, 2), (9, 0)]},
    {"local_steps": "often"},
    {"variant": "papers"},
    {"workers": "nodes"},
    {"comm_dtype": "float8"},
    {"warmup_steps": -1},
]
BAD_OF_ONE = [
    *(("outer_momentum", value, name) for name in WITH_MOMENTUM for value in (1.0, -0.1, 1.5)),
    *(("outer_lr", value, name) for name in WITH_MOMENTUM for value in (-0.1, 0.0)),
    ("momentum_clip", -1.0, "CO2Strategy"),
    ("momentum_clip", 0.0, "CO2Strategy"),
    ("staleness_penalty", "gaps", "CO2Strategy"),
    ("staleness_penalty", 0.0, "CO2Strategy"),
    ("variant", "paper", "LocalSGDStrategy"),
    ("local_steps", "auto", "LocalSGDStrategy"),
    ("local_steps", "auto", "SlowMoStrategy"),
    ("local_steps", "auto", "DiLoCoStrategy"),
]


@pytest.mark.parametrize("settings", BAD, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_bad_settings_are_refused_at_once(name, settings):
    if name != "CO2Strategy":
        settings = {"delayed": True, **settings}
    with pytest.raises(ValueError, match=next(word for word in settings if word != "delayed")):
        CLASSES[name](**settings)


@pytest.mark.parametrize(("setting", "value", "name"), BAD_OF_ONE)
def test_bad_settings_of_a_method_are_refused_at_once(setting, value, name):
    with pytest.raises(ValueError, match=re.escape(f"{setting}={value!r}")):
        CLASSES[name](**{setting: value})


@pytest.mark.parametrize("name", CLASSES)
def test_a_setting_that_does_not_exist_is_refused(name):
    with pytest.raises((TypeError, ValueError), match="local_step"):
        CLASSES[name](local_step=3)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="co3"):
        Trainer(**QUIET, strategy="co3")


@pytest.mark.parametrize("name", CLASSES)
def test_one_process_trains_plainly_and_is_told_so(name):
    plain = TwinNet(INNER)
    fit([], module=plain, train=one_process_data(), max_steps=12)
    alone = TwinNet(INNER)
    with Said() as said:
        fit([CLASSES[name](local_steps=3)], module=alone, train=one_process_data(), max_steps=12)
    assert torch.equal(vector(alone), vector(plain))
    assert any(name in line and "only one worker" in line for line in said.lines), said.lines


@pytest.mark.parametrize("precision", [FSDPPrecision("32-true"), DeepSpeedPrecision("32-true")], ids=type)
def test_the_precision_of_another_strategy_is_refused(precision):
    with pytest.raises(ValueError, match=type(precision).__name__):
        fit([strategies.CO2Strategy(), precision], module=TwinNet(INNER), train=one_process_data(), max_steps=2)


def test_a_module_that_is_sharded_already_is_refused(two_for_errors):
    errors = two_for_errors.run(f"{JOBS}:start_sharded", outer=SCHEMES["co2"])
    assert all("CO2Strategy" in error and "shard" in error for error in errors), errors


@pytest.mark.parametrize("how", ["another layer", "another shape", "another type", "frozen"])
def test_parameters_that_differ_between_the_processes_are_named(two_for_errors, how):
    errors = two_for_errors.run(f"{JOBS}:start_apart", outer=SCHEMES["co2"], how=how)
    for error in errors:
        assert error.startswith("CO2Strategy: parameter 'head."), errors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_worker_starts_from_the_weights_of_rank_zero(two_for_errors, scheme):
    settings = {"outer": SCHEMES[scheme], "inner": INNER, "steps": 8}
    runs = two_for_errors.run(f"{JOBS}:train_from_other_weights", **settings)
    wanted = simulate(SCHEMES[scheme], INNER, random_data(2, BATCHES), steps=8)
    for process, run in enumerate(runs):
        np.testing.assert_allclose(run["after_step"][0].numpy(), wanted.after_step[0][process], rtol=0, atol=1e-9)
        np.testing.assert_allclose(run["final"].numpy(), wanted.final, rtol=0, atol=1e-9)


def test_a_module_without_an_optimizer_is_refused(two_for_errors):
    errors = two_for_errors.run(f"{JOBS}:start_without_optimizer", outer=SCHEMES["co2"])
    assert all("CO2Strategy" in error and "optimizer" in error for error in errors), errors


def test_processes_of_one_node_are_one_worker_and_are_told_so(two_for_errors):
    outer = replace(SCHEMES["co2"], processes_per_worker=2)
    runs = two_for_errors.run(f"{JOBS}:train_and_listen", outer=outer, inner=INNER, steps=7)
    # Plain training with averaged gradients is all that is left.
    wanted = simulate(replace(SCHEMES["local_sgd"], warmup_steps=7), INNER, random_data(2, BATCHES), steps=7)
    for run in runs:
        np.testing.assert_allclose(run["final"].numpy(), wanted.final, rtol=0, atol=1e-9)
    assert any("CO2Strategy" in line for line in runs[0]["said"]), runs[0]["said"]
