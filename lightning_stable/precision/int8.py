"""Int8 training by torchao: the matrix products of linear layers on int8 tensor cores, weights in high precision.

Use it on GPUs that have int8 and no float8 tensor cores (NVIDIA Ampere, compute capability 8.0 and 8.6), for models
with wide linear layers and with ``torch.compile``. Inputs, weights and gradients are rounded to the nearest of 255
values, with one scale a row, at each step and in both passes. On the CPU the same products run without being fast; to
try int8 with other scales or other rounding there is SimulatedPrecision.

Needs torchao: ``pip install "lightning-stable[torchao]"``.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.precision.int8 import Int8Precision
    >>> precision = Int8Precision(compute="bf16-mixed")
    >>> trainer = Trainer(plugins=[precision], logger=False, enable_checkpointing=False)
"""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_stable.precision._torchao import TorchaoPrecision, check_cuda
from lightning_stable.precision._torchao_layers import Sample, sample_of

__all__ = ["Int8Precision"]

# torch's own int8 product on a GPU wants more than 16 rows, and multiples of 8 elsewhere.
_ROWS = 32
_WIDTHS = 16
# The same for all layers, as torch.compile looks at classes.
_CLASSES: dict[type, type[nn.Linear]] = {}


@dataclass(frozen=True)
class _Products:
    """What torchao's layers read of their config: ``torch.compile`` takes a frozen one without breaking its graph."""

    output: bool
    grad_input: bool
    grad_weight: bool


class _Parts(NamedTuple):
    """What the forward pass of torchao's layers reads of a layer."""

    weight: Tensor
    bias: Tensor | None
    config: _Products


def _biased_as_its_input(kind: type[nn.Linear]) -> type[nn.Linear]:
    """Return torchao's class with a bias that is cast as its weight is.

    A product in bfloat16 plus a bias in float32 is in float32, and so is the gradient that comes back: torchao cannot
    multiply it by an input in bfloat16.
    """

    def forward(self: nn.Linear, rows: Tensor) -> Tensor:
        # nn.Linear declares a bias that may be None as a tensor.
        bias = cast("Tensor | None", self.bias)
        parts = _Parts(self.weight, None if bias is None else bias.to(rows.dtype), cast(_Products, self.config))
        output: Tensor = cast(Any, kind).forward(parts, rows)
        return output

    if kind not in _CLASSES:
        _CLASSES[kind] = type(kind.__name__, (kind,), {"forward": forward})
    return _CLASSES[kind]


class Int8Precision(TorchaoPrecision):
    """Linear layers compute in int8, by torchao's mixed-precision training with swapped modules.

    torchao's other way, by a tensor subclass, is its default and does nothing with the versions tried (0.18.0).

    Args:
        include: Patterns of names of linear layers, as of file names; each has to match one.
        exclude: Patterns of names of layers that stay in high precision all the same.
        width_multiple: Layers whose two widths are not both multiples of it stay in high precision. On a GPU a multiple
            of 16; the CPU takes any.
        first_steps_high_precision: Optimizer steps, counted as ``trainer.global_step``, before the layers are
            converted.
        compute: What everything else computes in: "32-true", "bf16-true" or "bf16-mixed". In the first and the last
            the weights that are trained are in float32.
        output: Whether the product of the forward pass is in int8.
        grad_input: Whether the product that gives the gradient of the input is.
        grad_weight: Whether the product that gives the gradient of the weight is.

    Raises:
        ImportError: If torchao is missing, or it or torch is too old.
        ValueError: If a setting is not allowed; when training begins, for a device without int8 kernels, a strategy
            that does not go with it, and filters that leave no layer.
    """

    def __init__(
        self,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("*head*",),
        width_multiple: int = 16,
        first_steps_high_precision: int = 0,
        compute: str = "32-true",
        output: bool = True,
        grad_input: bool = True,
        grad_weight: bool = True,
    ) -> None:
        if not (output or grad_input or grad_weight):
            raise ValueError(
                f"{type(self).__name__}: output, grad_input and grad_weight are all False, so that nothing would be in "
                "int8. Leave one at True, or leave the plugin out."
            )
        super().__init__(
            include=include,
            exclude=exclude,
            width_multiple=width_multiple,
            first_steps_high_precision=first_steps_high_precision,
            compute=compute,
        )
        self.output = output
        self.grad_input = grad_input
        self.grad_weight = grad_weight

    @override
    def _check_device(self, device: torch.device) -> None:
        if device.type == "cpu":
            return
        if self.width_multiple % _WIDTHS:
            raise ValueError(
                f"{type(self).__name__}: width_multiple={self.width_multiple} is not a multiple of {_WIDTHS}, which "
                f"int8 on {device} needs. Other widths can be tried on the CPU."
            )
        check_cuda(type(self).__name__, device, (8, 0), "int8")

    @override
    def _convert_sample(self, layer: nn.Module, device: torch.device) -> Sample:
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
        from torchao.quantization import quantize_

        products = _Products(self.output, self.grad_input, self.grad_weight)
        quantize_(layer, Int8MixedPrecisionTrainingConfig(**asdict(products), module_swap=True))
        sample = sample_of(layer, 1 if device.type == "cpu" else _ROWS, astuple(products))
        return Sample(_biased_as_its_input(sample.kind), {**sample.attributes, "config": products}, sample.products)

    @override
    def _format(self, device: torch.device) -> str:
        return "int8"
