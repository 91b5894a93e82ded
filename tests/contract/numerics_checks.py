"""The oracles of the instruments of low-bit training: operands and logits, from recorded weights, by the twins."""

import math
from typing import Any

import pytest
import torch
from oracles import logit_sharpness_twin
from oracles.numerics_twin import LARGEST, Counts, quantized
from oracles.replay import Replay
from torch import Tensor, nn

from lightning_stable.callbacks._numerics_taps import NumericsTaps
from lightning_stable.callbacks.logit_sharpness import LogitSharpness
from lightning_stable.callbacks.numerics_monitor import NumericsMonitor
from lightning_stable.testing.harness import Net, Run
from lightning_stable.testing.rows import STEPS
from lightning_stable.testing.streams import BATCHES, Stream

# ---------------------------------------------------------------------------------------------------- logits


def classes_of(batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return three classes for a batch of a regression."""
    return (10 * batch[1]).long().flatten().remainder(3)


SHARPNESS: dict[str, Any] = {"logits": "head", "targets": classes_of, "epsilon": 0.01, "every_n_steps": 2}


def logit_sharpness(run: Run, plugin: LogitSharpness) -> None:
    again, epoch = Replay(run), -(-BATCHES // run.trainer.accumulate_grad_batches)
    # Of bfloat16 logits a rounding is as much as the change that is looked for.
    close = {"rel": 5e-2} if again.bf16 else {"rel": 2e-4}
    validated, trained = [], {}
    for replayed in again:
        if replayed.number and replayed.number % epoch == 0:
            validated.append(_validated(again, replayed.step.before))
        if replayed.number % 2 == 1:
            trained[replayed.number] = _sharpness(replayed.logits(), replayed.batches)
    if STEPS % epoch == 0:
        validated.append(_validated(again, run.steps[-1].weights))
    found = [entry["logit_sharpness"] for _, entry in run.logged if "logit_sharpness" in entry]
    assert found == pytest.approx(validated, **close), "the sharpness of a validation is not the twin's"
    assert plugin.latest == pytest.approx(found[-1])
    name = "logit_sharpness_train"
    found = {step: entry[name] for step, entry in run.logged if name in entry}
    assert found == {step: pytest.approx(value, **close) for step, value in trained.items()}
    assert max(found.values()) > 0.1


def _validated(again: Replay, weights: dict[str, Tensor]) -> float:
    """Return the sharpness over the validation, with these weights and the present buffers."""
    module, stream = Net(), Stream(2, seed=5)
    module.load_state_dict({**weights, **dict(again.module.named_buffers())})
    module.eval()
    batches = [stream.batch(number) for number in range(2)]
    with torch.no_grad(), again.precision():
        return _sharpness([module.head(module.body(batch[0])) for batch in batches], batches)


def _sharpness(logits: list[Tensor], batches: list[Any]) -> float:
    classes = [int(each) for batch in batches for each in classes_of(batch)]
    return logit_sharpness_twin.mean_sharpness(torch.cat(logits).float().tolist(), classes, SHARPNESS["epsilon"])


# ---------------------------------------------------------------------------------------------------- operands


WATCHED: dict[str, Any] = {"every_n_steps": 2, "format": "e4m3", "gradient_format": "e5m2"}


def numerics_monitor(run: Run, plugin: NumericsMonitor) -> None:
    record, again = plugin.record(), Replay(run)
    formats = {"weights": "e4m3", "activations": "e4m3", "gradients": "e5m2"}
    assert record["rows"] == [[layer, operand] for layer in ("body.0", "head") for operand in formats]
    assert record["steps"] == list(range(2, STEPS + 1, 2))
    seen = Operands(again.module)
    lost = 0.0
    for replayed in again:
        if replayed.number % 2 == 0:
            continue
        seen.found = []
        replayed.gradients()
        counts = {
            (layer, kind): Counts(LARGEST[form]) for layer in ("body.0", "head") for kind, form in formats.items()
        }
        for layer, kind, value in seen.found:
            counts[layer, kind].add(value, quantized(value.float(), formats[kind]))
        expected = [counts[layer, kind].measures() for layer, kind in record["rows"]]
        values = record["values"][record["steps"].index(replayed.number + 1)]
        for row, found, wanted in zip(record["rows"], values.tolist(), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6), f"{row} of step {replayed.number}"
        _assert_logged(run, replayed.number, record["rows"], expected)
        lost += sum(row[0] for row in expected)
    assert lost > 0, "nothing underflows: the case shows little"
    assert math.isclose(plugin.latest["numerics/weights/absmax_worst"], float(record["values"][-1, ::3, 3].max()))


class MonitorOfTwo(NumericsMonitor):
    """What two processes report, in one: the loss of each is a mean over half as many samples."""

    def _make_taps(self) -> NumericsTaps:
        taps = super()._make_taps()
        taps.__class__ = _TapsOfTwo
        return taps


class _TapsOfTwo(NumericsTaps):
    def _after_backward(self, layer: str, part: nn.Module, gradient: Tensor) -> None:
        super()._after_backward(layer, part, 2 * gradient)


class Operands:
    """What the layers of a module multiply, seen by hooks of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.found: list[tuple[str, str, Tensor]] = []
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_hook(
                    lambda part, inputs, output, name=name: self._take(name, part, inputs, output)
                )

    def _take(self, name: str, part: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.found.append((name, "weights", part.weight.detach().clone()))
        self.found.append((name, "activations", inputs[0].detach().clone()))
        if output.requires_grad:
            output.register_hook(lambda gradient: self.found.append((name, "gradients", gradient.clone())))


def _assert_logged(run: Run, step: int, rows: list[list[str]], expected: list[list[float]]) -> None:
    """Fail unless the worst layer and the mean over layers of one step were logged."""
    (logged,) = [entry for at, entry in run.logged if at == step and "numerics/weights/sqnr_worst" in entry]
    for operand in ("weights", "activations", "gradients"):
        own = [values for row, values in zip(rows, expected, strict=True) if row[1] == operand]
        for column, name in enumerate(("underflow", "saturation", "sqnr", "absmax")):
            values = [row[column] for row in own]
            worst = min(values) if name == "sqnr" else max(values)
            assert logged[f"numerics/{operand}/{name}_worst"] == pytest.approx(worst, rel=1e-3)
            if name != "absmax":
                mean = math.fsum(values) / len(values)
                assert logged[f"numerics/{operand}/{name}_mean"] == pytest.approx(mean, rel=1e-3)
