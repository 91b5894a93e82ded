"""The simulation of `benchmarks/co2_quality.py` trains as the real strategies do in two processes."""

import pytest
import torch
from strategies.co2_quality_jobs import co2_quality

Method = co2_quality.Method
METHODS = [
    co2_quality.LOCAL_SGD,
    Method("SlowMo", outer_lr=0.8, outer_momentum=0.5),
    Method("DiLoCo", outer_lr=0.7, outer_momentum=0.9),
    Method("CO2", "paper", outer_lr=0.7, outer_momentum=0.5, penalty="gap"),
    Method("CO2", "corrected", clip=0.004),
]
# Four rounds, or three after the warm-up, and some steps of one more.
STEPS, LOCAL_STEPS, WARMUP = 24, 5, 6  # a quarter


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Where DDP has left the warm-up."""
    folder = tmp_path_factory.mktemp("snapshots")
    co2_quality.fit(job(co2_quality.DDP, 1, 0), folder)
    return folder


def job(method, workers, warmup):
    return co2_quality.Job("digits", method, LOCAL_STEPS, workers, warmup, 3, STEPS, 3e-3)


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_simulation_is_the_strategy(workers, snapshots, method, warmup):
    one = job(method, 2, warmup)
    simulated = co2_quality.fit(one, snapshots).weights
    fields = {**one._asdict(), "method": method._asdict()}
    first, second = workers.run("strategies.co2_quality_jobs:train", fields=fields)
    assert torch.equal(first, second)
    torch.manual_seed(one.seed)
    start = torch.nn.utils.parameters_to_vector(co2_quality.load("digits").build().parameters()).detach()
    assert float((simulated - start).abs().max()) > 0.005
    # A mean over two workers' gradients rounds otherwise than one over their batches together.
    torch.testing.assert_close(simulated, first, rtol=0, atol=1e-6 if warmup == 0 else 2e-5)
