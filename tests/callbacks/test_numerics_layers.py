"""NumericsMonitor: layers of every kind, and that they show, unconverted, what they would as converted ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import entries
from lightning.pytorch import LightningModule
from oracles.numerics_twin import Counts, quantized
from torch import Tensor, nn

from lightning_stable.callbacks.numerics_monitor import NumericsMonitor
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import convert, quantized_layers
from lightning_stable.testing.harness import Stream, fit

OPERANDS = ("weights", "activations", "gradients")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Convolves(LightningModule):
    """Layers of every kind, one of which is called with its input by name, and one of which is not called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv1d(2, 4, 3, padding=1)
        self.second = nn.Linear(12, 4)
        self.idle = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.first(x.view(-1, 2, 3)).flatten(1)
        out = self.second(input=hidden)
        out.relu_()  # in place: gradients are those of what the layer put out
        return nn.functional.mse_loss(out.mean(1, keepdim=True), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def expected_of(module: Convolves, batch: Any) -> dict[tuple[str, str], Tensor]:
    """Return the operands of one step, by autograd."""
    x, y = batch
    images = x.view(-1, 2, 3)
    first = module.first(images)
    hidden = first.flatten(1)
    second = module.second(hidden)
    loss = nn.functional.mse_loss(second.relu().mean(1, keepdim=True), y)
    gradients = torch.autograd.grad(loss, [first, second])
    return {
        ("first", "weights"): module.first.weight,
        ("first", "activations"): images,
        ("first", "gradients"): gradients[0],
        ("second", "weights"): module.second.weight,
        ("second", "activations"): hidden,
        ("second", "gradients"): gradients[1],
    }


def test_layers_of_every_kind_are_watched() -> None:
    wanted = expected_of(Convolves(), Stream().batch(0))
    monitor = NumericsMonitor(every_n_steps=1, format="e4m3", directory="numbers", log_layers=True)
    run = fit([monitor], module=Convolves(), max_steps=1, limit_val_batches=0)
    (line,) = map(json.loads, Path("numbers", "numerics.jsonl").read_text().splitlines())
    assert line["step"] == 1
    assert sorted(line["layers"]) == ["first", "second"], "what was not called has nothing to say"
    for (layer, operand), exact in wanted.items():
        counts = Counts(448.0)
        counts.add(exact, quantized(exact.detach(), "e4m3"))
        entry = line["layers"][layer][operand]
        numbers = [entry[name] for name in ("underflow", "saturation", "sqnr", "absmax")]
        assert numbers == pytest.approx(counts.measures(), rel=1e-4), (layer, operand)
        lowest, exponents = counts.histogram()
        assert entry["exponents"] == {"lowest": lowest, "counts": exponents}
        assert (entry["format"], entry["nonfinite"]) == ("e4m3", 0)
        logged = entries(run.logged, f"numerics/{operand}/absmax/{layer}")
        assert logged == {0: pytest.approx(entry["absmax"])}


def test_scales_of_a_convolution_run_over_samples_and_output_channels() -> None:
    wanted = expected_of(Convolves(), Stream().batch(0))
    monitor = NumericsMonitor(every_n_steps=1, format="int4", scaling="row", include=["first"])
    fit([monitor], module=Convolves(), max_steps=1, limit_val_batches=0)
    for place, operand in enumerate(OPERANDS):
        counts = Counts(math.inf)
        for row in wanted["first", operand].detach().flatten(1):
            scale = row.abs().max() / 7
            counts.add(row, (row / scale).round().clamp(-7, 7) * scale)
        assert monitor.record()["values"][0, place].tolist() == pytest.approx(counts.measures(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- scales


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


# It is known by its name.
Conv1D.__module__ = "transformers.pytorch_utils"


class Own(nn.Linear):
    """One that cannot be converted, since it might multiply otherwise."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input)


class One(LightningModule):
    """One layer, whose input and whose output's gradient are given, so that they hang on no quantization."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(4)
        self.x, self.given = x, torch.randn(layer(x).shape, generator=generator)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer(self.x) * self.given).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def one(kind: str) -> One:
    torch.manual_seed(5)
    layer: nn.Module = {
        "linear": lambda: nn.Linear(40, 24),
        "transposed": lambda: Conv1D(24, 40),
        "convolution": lambda: nn.Conv2d(3, 6, 3),
        "own": lambda: Own(40, 24),
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(40, 24)),
    }[kind]()
    x = torch.randn((4, 3, 7, 9) if kind == "convolution" else (4, 3, 5, 40))
    return One(layer, x * torch.exp(torch.randn_like(x)))


def report(module: One, **settings: Any) -> list[list[float]]:
    monitor = NumericsMonitor(every_n_steps=1, picture=None, **settings)
    fit([monitor], module=module, max_steps=1, limit_val_batches=0)
    assert monitor.record()["rows"] == [["layer", operand] for operand in OPERANDS]
    return monitor.record()["values"][0].tolist()


@pytest.mark.parametrize(
    ("form", "scaling"),
    [("mxfp4", "none"), ("int4", "group:16"), ("int4", "row"), ("int4", "channel"), ("e2m1", "shift:4")],
)
@pytest.mark.parametrize("kind", ["linear", "transposed", "convolution"])
def test_a_layer_shows_what_it_would_as_a_converted_one(kind: str, form: str, scaling: str) -> None:
    converted, quantizer, seen = one(kind), Quantizer(form, scaling=scaling), {}
    convert(converted, weights=quantizer, activations=quantizer, gradients=quantizer)

    def observe(_: str, operand: str, exact: Tensor, after: Tensor) -> None:
        counts = seen[operand] = Counts(math.inf)
        counts.add(exact, after)

    quantized_layers(converted)["layer"].observers.append(observe)
    own = report(converted)
    assert report(one(kind), format=form, scaling=scaling) == [pytest.approx(row, rel=1e-5) for row in own]
    # What became of each entry in training; which of them saturated hangs on the blocks.
    for operand, row in zip(OPERANDS, own, strict=True):
        expected = seen[operand].measures()
        assert [row[0], *row[2:]] == pytest.approx([expected[0], *expected[2:]], rel=1e-4), operand


@pytest.mark.parametrize(
    ("kind", "converted"), [("linear", False), ("linear", True), ("own", False), ("parametrized", False)]
)
def test_blocks_of_an_input_of_four_dimensions_run_along_its_last_one(kind: str, converted: bool) -> None:
    module, beyond = one(kind), 0
    for row in module.x.flatten(0, -2):
        for block in row.split(32):
            scale = 2.0 ** (math.floor(math.log2(block.abs().max())) - 2)
            beyond += int((block.abs() > 6 * scale).sum())
    if converted:
        convert(module, **dict.fromkeys(OPERANDS, Quantizer("mxfp4")))
    before = type(module.layer)
    values = report(module, **({} if converted else {"format": "mxfp4"}))
    assert values[1][1] == pytest.approx(beyond / module.x.numel())
    assert beyond > 0
    assert type(module.layer) is before, "the layer stays what it is"
