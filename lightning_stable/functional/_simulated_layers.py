"""The classes that converted layers are given, and what each of them is told: see :mod:`.simulated`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_stable.functional.fading_helper import Helper, helper_matrix
from lightning_stable.functional.quantize import Quantizer, quantize, quantize_gradient, straight_through

__all__ = [
    "LayerQuantization",
    "Observer",
    "Quantized",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvolution",
    "QuantizedLinear",
    "QuantizedTransposed",
]

# Of a batch of images, however large they are, where some samples are to stand for all.
_FEWEST_IMAGES = 8

# Called with the layer's name, which operand ("weights", "activations" or "gradients"), it and what it became.
Observer = Callable[[str, str, Tensor, Tensor], None]


@dataclass(eq=False)
class LayerQuantization:
    """How one layer is quantized: read at each of its passes, so that what is changed holds from the next one on.

    Attributes:
        name: Dotted path of the layer within the module that was converted.
        weights: The weight's quantizer; ``None`` leaves it as it is.
        activations: The input's quantizer.
        gradients: The quantizer of the gradient that arrives at the output.
        enabled: ``False`` lets the layer compute as it did before it was converted.
        observers: Called with each quantized operand, if there are any.
        outlier_threshold: Input features with a value of at least this size multiply as they are; ``None``: none does.
        generator: What stochastic rounding draws from, on the layer's device; ``None`` for torch's own.
        reste_exponent: The present exponent of the estimator ``"reste"``.
        helper: What is added to the quantized weight, which observers are not shown; ``None``: nothing.
    """

    name: str
    weights: Quantizer | None = None
    activations: Quantizer | None = None
    gradients: Quantizer | None = None
    enabled: bool = True
    observers: list[Observer] = field(default_factory=list)
    outlier_threshold: float | None = None
    generator: torch.Generator | None = None
    reste_exponent: float = 1.0
    helper: Helper | None = None

    @property
    def quantizes(self) -> bool:
        """Whether any operand is quantized."""
        return self.weights is not None or self.activations is not None or self.gradients is not None

    def tell(self, operand: str, exact: Tensor, quantized: Tensor) -> None:
        """Show an operand to the observers."""
        with torch.no_grad():
            for observer in list(self.observers):
                observer(self.name, operand, exact.detach(), quantized.detach())

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerQuantization":
        # A copied layer draws from the same stream, as it would from torch's own, and nobody watches it.
        return replace(self, observers=[])


class Quantized(nn.Module):
    """What comes before the class of a converted layer, here a linear one."""

    plain: ClassVar[type[nn.Module]]
    quantization: LayerQuantization

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name that it has in torch
        state = self.quantization
        if not (state.enabled and state.quantizes) or input.numel() == 0:
            return cast(Tensor, super().forward(input))
        return self._observed(input) if state.observers else self._quantized(input)

    # Observers are no part of a compiled graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _observed(self, x: Tensor) -> Tensor:
        return self._quantized(x)

    def _quantized(self, exact: Tensor) -> Tensor:
        state, layer = self.quantization, cast(Any, self)
        if state.generator is not None and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"Layer {state.name!r} is computed again in the backward pass, as activation checkpointing does, and "
                "stochastic rounding would draw other numbers than before: gradients would be wrong. Take "
                "rounding='nearest', or leave out the checkpointing."
            )
        outliers = self._outliers(exact)
        columns = None if outliers is None else self._columns(outliers)
        x = self._operand("activations", state.activations, exact, outliers)
        weight = self._operand("weights", state.weights, layer.weight, columns)
        if state.helper is not None and state.weights is not None:
            helper = helper_matrix(state.helper, weight)
            helper = helper if columns is None else helper.masked_fill(columns, 0)
            weight = (weight + helper).to(weight.dtype)
        if state.gradients is None:
            return self._product(x, weight, layer.bias)
        y = self._flowing_back(self._product(x, weight, None), state.gradients)
        return y if layer.bias is None else y + self._along_output(layer.bias.to(y.dtype))

    @torch.no_grad()
    def rounded(self, which: str, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        """Return an operand of the product with an input, to compare quantizers: unobserved, and without a helper.

        Args:
            which: ``"weights"`` or ``"activations"``.
            x: The input, which outliers are of.
            quantizer: In the place of the layer's own; ``None`` for the operand as it is.
        """
        outliers = self._outliers(x)
        if which == "activations":
            return self._rounded(which, quantizer, x, outliers)
        columns = None if outliers is None else self._columns(outliers)
        return self._rounded(which, quantizer, cast(Tensor, self.weight), columns)

    @torch.no_grad()
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product of two operands that :meth:`rounded` gave, without the bias."""
        return self._product(x, weight, None)

    @torch.no_grad()
    def weight_error(self) -> Tensor:
        """Return what rounding to the nearest takes from the weight, W - Q(W), zero where it is not quantized."""
        weight, quantizer = cast(Tensor, self.weight).detach(), self.quantization.weights
        if quantizer is None:
            return torch.zeros_like(weight)
        low = quantize(self.matrix("weights", weight, quantizer), replace(quantizer, rounding="nearest"))
        return weight - self._shaped("weights", low, weight)

    def samples(self, x: Tensor, count: int) -> Tensor:
        """Return at most so many rows of an input, evenly out of all of it; of images about so many positions."""
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: -(-len(rows) // count)]

    def matrix(self, operand: str, x: Tensor, quantizer: Quantizer) -> Tensor:
        """Return an operand as the matrix over whose rows the quantizer's scales run."""
        return x.flatten(1, -2) if x.ndim > 3 else x

    def _shaped(self, operand: str, matrix: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`matrix`."""
        return matrix.reshape(like.shape)

    def _operand(self, which: str, quantizer: Quantizer | None, exact: Tensor, outliers: Tensor | None) -> Tensor:
        """Return the quantized operand, through which gradients pass, and show it."""
        found = self._rounded(which, quantizer, exact, outliers)
        if quantizer is not None and self.quantization.observers:
            self.quantization.tell(which, exact, found)
        return found

    def _rounded(self, which: str, quantizer: Quantizer | None, exact: Tensor, outliers: Tensor | None) -> Tensor:
        if quantizer is None:
            return exact
        state = self.quantization
        rest = exact if outliers is None or which == "weights" else exact.masked_fill(outliers, 0)
        matrix = self.matrix(which, rest, quantizer)
        found = straight_through(matrix, quantizer, generator=state.generator, reste_exponent=state.reste_exponent)
        found = self._shaped(which, found, exact)
        return found if outliers is None else torch.where(outliers, exact, found)

    def _flowing_back(self, product: Tensor, quantizer: Quantizer) -> Tensor:
        """Return the product, with the gradient quantized that flows back into it."""
        state = self.quantization
        if not state.observers:
            matrix = self.matrix("gradients", product, quantizer)
            matrix = quantize_gradient(matrix, quantizer, generator=state.generator)
            return self._shaped("gradients", matrix, product)

        def quantized(gradient: Tensor) -> Tensor:
            # A second derivative passes here as it does without observers.
            matrix = self.matrix("gradients", gradient, quantizer)
            matrix = straight_through(matrix, quantizer, generator=state.generator)
            found = self._shaped("gradients", matrix, gradient)
            state.tell("gradients", gradient, found)
            return found

        if product.requires_grad:
            cast(Any, product).register_hook(quantized)
        return product

    def _outliers(self, x: Tensor) -> Tensor | None:
        """Return which features have outliers, a mask that broadcasts over the input."""
        threshold = self.quantization.outlier_threshold
        if threshold is None:
            return None
        feature = self._feature(x)
        others = [dimension for dimension in range(x.ndim) if dimension != feature]
        size = x.detach().abs()
        return (size.amax(others, keepdim=True) if others else size) >= threshold

    # ------------------------------------------------------------------ what convolutions do otherwise

    def _feature(self, x: Tensor) -> int:
        return x.ndim - 1

    def _columns(self, outliers: Tensor) -> Tensor:
        return outliers.flatten()

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def _along_output(self, bias: Tensor) -> Tensor:
        return bias


class QuantizedTransposed(Quantized):
    """The same before transformers' ``Conv1D``, a linear layer that stores its weight as (in, out)."""

    def _columns(self, outliers: Tensor) -> Tensor:
        return outliers.flatten()[:, None]

    def matrix(self, operand: str, x: Tensor, quantizer: Quantizer) -> Tensor:
        return x.t() if operand == "weights" else super().matrix(operand, x, quantizer)

    def _shaped(self, operand: str, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.t() if operand == "weights" else super()._shaped(operand, matrix, like)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight.t(), bias)


class QuantizedConvolution(Quantized):
    """The same before a convolution."""

    kernel_size: tuple[int, ...]

    def samples(self, x: Tensor, count: int) -> Tensor:
        if self._feature(x) == 0:
            return x  # an image without a batch
        kept = max(_FEWEST_IMAGES, count // max(1, x[0, 0].numel()))
        return x[:: -(-len(x) // kept)]

    def _feature(self, x: Tensor) -> int:
        return x.ndim - len(self.kernel_size) - 1

    def _columns(self, outliers: Tensor) -> Tensor:
        groups, weight = cast(int, self.groups), cast(Tensor, self.weight)
        out, each = weight.shape[0], weight.shape[1]
        mask = outliers.reshape(groups, 1, each).expand(groups, out // groups, each)
        return mask.reshape(out, each, *(1 for _ in self.kernel_size))

    def matrix(self, operand: str, x: Tensor, quantizer: Quantizer) -> Tensor:
        channel = self._feature(x)
        samples = 1 if channel == 0 else x.shape[0]
        if quantizer.layout == "shift":
            # Each channel has a scale, which of so many dimensions is the second one.
            return x.reshape(samples, x.shape[channel], -1, 1)
        return x.reshape(samples, -1)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, cast(Any, self)._conv_forward(x, weight, bias))

    def _along_output(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *(1 for _ in self.kernel_size))


class QuantizedLinear(Quantized, nn.Linear):
    """A converted ``nn.Linear``; only :func:`convert` makes one."""

    plain = nn.Linear


class QuantizedConv1d(QuantizedConvolution, nn.Conv1d):
    """A converted ``nn.Conv1d``; only :func:`convert` makes one."""

    plain = nn.Conv1d


class QuantizedConv2d(QuantizedConvolution, nn.Conv2d):
    """A converted ``nn.Conv2d``; only :func:`convert` makes one."""

    plain = nn.Conv2d


class QuantizedConv3d(QuantizedConvolution, nn.Conv3d):
    """A converted ``nn.Conv3d``; only :func:`convert` makes one."""

    plain = nn.Conv3d
