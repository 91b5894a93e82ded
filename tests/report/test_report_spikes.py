"""The rule for spikes, against a slow twin and at its boundaries; and when a run counts as diverged."""

import math

import pytest
import torch
from oracles import report_twin
from report.report_runs import losses

from lightning_stable._report.facts import Loss, divergence, span
from lightning_stable._report.spikes import SpikeBand, SpikeRule, find_spikes, rule_in_words


def noise(seed):
    return iter(torch.randn(1000, generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("kind", ["noise", "falling", "heavy tail", "new level", "constant", "not finite"])
@pytest.mark.parametrize("rule", [SpikeRule(), SpikeRule(2.0, 9, 0.0), SpikeRule(0.5, 2, 0.3)], ids=str)
def test_spikes_are_those_of_the_twin(kind, rule):
    draw = noise(1)
    make = {
        "noise": lambda step: 5 + next(draw) + 40 * (step % 97 == 96),
        "falling": lambda step: 10 * math.exp(-step / 60) + 0.1 * next(draw) + 5 * (step % 120 == 119),
        "heavy tail": lambda step: math.exp(2 * next(draw) - 3),
        "new level": lambda step: (1 if step < 200 else 4) + 0.1 * next(draw),
        "constant": lambda step: 2.0 if step % 150 else 7.0,
        "not finite": lambda step: [1.0, 1.1, math.nan, math.inf, 9.0][step * step % 5] if step > 100 else 1.0,
    }[kind]
    points = [(step, make(step)) for step in range(400)]
    expected = report_twin.spikes(points, *rule)
    found, _ = find_spikes(points, rule)
    assert [(spike.step, pytest.approx(spike.limit)) for spike in found] == expected
    if kind in ("noise", "falling"):
        assert expected, "the case shows nothing"


def test_one_high_value_is_a_spike_and_uneven_batches_are_none():
    assert [spike.step for spike in find_spikes(list(enumerate(losses())))[0]] == [200]
    draw = noise(2)
    uneven = [3 * math.exp(-step / 30) + math.exp(0.9 * next(draw) - 5) for step in range(600)]
    assert find_spikes(list(enumerate(uneven)))[0] == []


def test_what_is_not_finite_is_counted_and_never_usual():
    found, band = find_spikes([(step, math.nan if 50 <= step < 90 else 1.0) for step in range(200)])
    assert (found, band.not_finite, band.first_not_finite) == ([], 40, 50)


def test_a_band_goes_on_from_its_state():
    points = [(step, 8.0 if step in (70, 71, 150) else 1 + 0.01 * (step % 5)) for step in range(200)]
    whole, _ = find_spikes(points, SpikeRule(window=32))
    first, second = SpikeBand(SpikeRule(window=32)), SpikeBand(SpikeRule(window=32))
    early = [first.take(*point) for point in points[:71]]
    second.load_state_dict(first.state_dict())
    late = [second.take(*point) for point in points[71:]]
    assert [spike for spike in early + late if spike] == whole
    assert len(whole) == 3


def test_the_rule_is_said_with_its_numbers():
    words = rule_in_words(SpikeRule(4.0, 64, 0.05))
    for part in ("4 standard deviations", "last 64 values", "5% of what the loss has fallen"):
        assert part in words
    assert "fallen" not in rule_in_words(SpikeRule(gained=0.0))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([3.0] * 5 + [1.0] * 95, ""),
        ([3.0] * 5 + [1.0] * 85 + [1.9] * 10, ""),
        ([3.0] * 5 + [1.0] * 85 + [2.1] * 10, "the loss ended at 2.1, above 2"),
        ([3.0] * 5 + [1.0] * 94 + [30.0], ""),
        ([1.0] * 100, ""),
        ([1.0] * 50 + [1.2] * 50, "above 1.05"),
        ([1.0] * 50 + [math.nan] * 50, "not a finite number from step 51 on"),
        ([math.inf] * 9, "never a finite number"),
        ([], ""),
    ],
)
def test_a_run_diverged_if_it_lost_half_of_what_it_had_learnt(values, why):
    points = list(enumerate(values, 1))
    _, band = find_spikes(points)
    loss = Loss("loss", points, [], band.not_finite, band.first_not_finite)
    if not why:
        assert divergence(loss) == ""
    elif "never" in why:
        assert divergence(loss)
    else:
        assert why in divergence(loss)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "not known"), (1.234, "1.23 s"), (59.99, "60 s"), (61, "1 min 1 s"), (7300, "2 h 1 min"), (2e5, "2 d 7 h")],
)
def test_times_are_said_in_words(seconds, text):
    assert span(seconds) == text
