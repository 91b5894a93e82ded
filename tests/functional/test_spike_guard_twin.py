"""The band of the spike guard decides like its slow twin, over long histories with spikes and changes of level."""

import math

import pytest
import torch
from oracles.spike_twin import SpikeTwin

from lightning_stable.functional.spike_guard import init_spike_band, reject_spike, spike_limit, update_spike_band


def history(kind, seed, length=300):
    """Positive values around a slowly falling level; with single spikes, with a new level, or with both signs."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, generator=generator).tolist()
    rare = torch.rand(length, generator=generator).tolist()
    values = []
    for step in range(length):
        value = (2 - step / length) * math.exp(0.2 * noise[step])
        if kind == "spikes" and rare[step] < 0.1:
            value *= (1.5, 10, 1e6)[step % 3]
        if kind == "level" and step > length // 2:
            value *= 20
        if kind == "signs":
            value -= 2
        values.append(value)
    return values


@pytest.mark.parametrize("kind", ["calm", "spikes", "level", "signs"])
@pytest.mark.parametrize(
    ("window", "minimum", "threshold"), [(2, 2, 1.0), (5, 3, 2.0), (16, 1, 3.0), (64, 32, 6.0), (7, 7, 0.5)]
)
@pytest.mark.parametrize("clip", [False, True])
def test_limits_and_decisions_are_the_twins(kind, window, minimum, threshold, clip):
    state, twin = init_spike_band(window), SpikeTwin(threshold, window, minimum)
    spikes = 0
    for value in history(kind, seed=window):
        limit = spike_limit(state, threshold, minimum)
        assert limit == pytest.approx(twin.limit(), rel=1e-9)
        if twin.is_spike(value):
            spikes += 1
            used = limit if clip else None
            state = reject_spike(state, value, used)
            twin.reject(value, used)
        else:
            state = update_spike_band(state, value)
            twin.accept(value)
    assert spikes or (kind == "calm" and threshold > 2) or (kind == "signs" and threshold > 2)
