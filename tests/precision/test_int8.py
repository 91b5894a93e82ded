"""Int8Precision against torchao used by hand, and torchao's faults that it works around."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import torchao_checks
from contract.broken import row
from contract.torchao_checks import to_int8
from precision.torchao_runs import by_hand, train
from precision.torchao_samples import needs_torchao
from torch import nn

from lightning_stable.precision.int8 import Int8Precision
from lightning_stable.testing import contracts
from lightning_stable.testing.contracts import MOMENTS
from lightning_stable.testing.harness import assert_same
from lightning_stable.testing.workers import Pair

pytestmark = needs_torchao
PRODUCTS = ("output", "grad_input", "grad_weight")


@pytest.fixture(scope="module")
def exact() -> list[float]:
    """The losses in float32."""
    return train(None).losses


@pytest.mark.parametrize("settings", [{}, {"grad_weight": False}, {"output": False}], ids=str)
def test_it_is_torchao_by_hand_bit_for_bit(settings: dict[str, bool]) -> None:
    module, expected = train(Int8Precision(**settings)), by_hand(to_int8(**settings))
    assert_same(module.losses, expected.losses, "losses")
    assert_same(dict(module.state_dict()), dict(expected.weights), "weights")


def test_it_follows_float32_and_is_not_float32(exact: list[float]) -> None:
    found = train(Int8Precision()).losses
    assert exact[-1] < 0.7 * exact[0], "the task is not learned"
    assert found[0] != exact[0]
    assert found == pytest.approx(exact, rel=0.03)


def test_every_product_is_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    multiply = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append(a.dtype) or multiply(a, b))
    plugin = Int8Precision(include=["net.2"])
    train(plugin, max_steps=2)
    # Three products in the probe of the setup, and three in each of two steps.
    assert calls == [torch.int8] * (3 + 2 * 3)
    calls.clear()
    train(Int8Precision(include=["net.2"], grad_weight=False), max_steps=2)
    assert len(calls) == 2 + 2 * 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_resumes_bit_by_bit(moment: str, tmp_path: Path) -> None:
    contracts.check_resume(row(Int8Precision, make=torchao_checks.SETTINGS["int8"].make), tmp_path, moment=moment)


@pytest.mark.parametrize("how", contracts.PRECISIONS)
def test_the_oracle_of_the_contracts(how: str, tmp_path: Path) -> None:
    of_row = replace(row(Int8Precision), settings=torchao_checks.SETTINGS["int8"])
    contracts.check_oracle(of_row, how, tmp_path)


def test_two_processes_stay_alike(workers: Pair, exact: list[float]) -> None:
    ranks = workers.run("precision.torchao_runs:ddp_job", name="int8")
    assert_same(ranks[0]["weights"], ranks[1]["weights"], "rank 0 against rank 1")
    for rank in ranks:
        assert rank["during"] == ["Int8MixedPrecisionTrainingLinear"] * 6
        assert rank["after"] == ["Linear"] * 3
    means = [sum(losses) / 2 for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert means == pytest.approx(exact[:6], rel=0.03)
    assert means != exact[:6]


# --------------------------------------------------------------------------------- faults of torchao


def default_int8(module: nn.Module) -> None:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    quantize_(module, Int8MixedPrecisionTrainingConfig())


def test_the_default_of_torchao_silently_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, torchao was mended: its tensor subclass may be offered beside swapped modules."""
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(8, 16)
    expected = layer(x)
    monkeypatch.setattr(torch, "_int_mm", lambda *_: pytest.fail("it multiplied in int8"))
    default_int8(layer)
    assert torch.equal(layer(x), expected)


def test_a_checkpoint_of_the_default_cannot_be_resumed_by_the_host() -> None:
    """If this fails, torchao or torch was mended. The host gives ``torch.load`` a function as ``map_location``."""
    layer, file = nn.Sequential(nn.Linear(16, 16)), io.BytesIO()
    default_int8(layer)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="Callable map_location not supported"):
        torch.load(file, map_location=lambda storage, location: storage, weights_only=False)


def test_torchao_cannot_take_inputs_that_are_not_contiguous() -> None:
    """If this fails, torchao was mended: the plugin need not make inputs contiguous any more."""
    layer = nn.Sequential(nn.Linear(16, 16))
    to_int8()(layer)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        layer(torch.randn(2, 16, 4).transpose(1, 2))


def test_torchao_cannot_take_an_empty_batch() -> None:
    """If this fails, torchao was mended: the plugin need not leave empty batches to the ordinary layer any more."""
    layer = nn.Sequential(nn.Linear(16, 16))
    to_int8()(layer)
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        layer(torch.randn(0, 16)).sum().backward()


def test_torchao_cannot_take_a_bias_of_another_dtype() -> None:
    """If this fails, torchao was mended: the plugin need not cast the bias any more."""
    layer = nn.Sequential(nn.Linear(16, 16))
    to_int8(grad_weight=False)(layer)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(4, 16).bfloat16()).sum().backward()


def test_torchao_breaks_the_graph_of_a_compiled_layer() -> None:
    """If this fails, torchao or torch was mended: the layers' config need not be frozen any more."""
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Linear(16, 16))
    to_int8()(layer)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(4, 16))


# --------------------------------------------------------------------------------- settings


def test_nothing_in_int8_is_refused() -> None:
    with pytest.raises(ValueError, match="Int8Precision: output, grad_input and grad_weight are all False"):
        Int8Precision(output=False, grad_input=False, grad_weight=False)


def test_a_gpu_without_int8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8\.0 or higher .* \(T4\) has 7\.5\. Use SimulatedPrecision"):
        Int8Precision()._check_device(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    Int8Precision()._check_device(cuda)
    with pytest.raises(ValueError, match="Int8Precision: width_multiple=1 is not a multiple of 16"):
        Int8Precision(width_multiple=1)._check_device(cuda)
    with pytest.raises(ValueError, match=r"trains on mps\. Use SimulatedPrecision"):
        Int8Precision()._check_device(torch.device("mps"))
