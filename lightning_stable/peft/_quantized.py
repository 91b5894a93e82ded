"""Bases that bitsandbytes holds in 4 bits: the residuals of QPiSSA, and a layer that computes with one.

A matrix is handed to bitsandbytes as one long row. Given as rows it gets wrong values back on CPUs with AVX-512, where
a row has a multiple of 16 weights and not whole blocks of 64 (measured with 0.50.2); and 64 weights in a row that share
a scale are the same either way.
"""

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from typing import Any, NamedTuple, cast

import torch
from packaging.version import Version
from torch import Tensor, nn
from typing_extensions import override

from lightning_stable.peft._record import tell_bits
from lightning_stable.peft._targets import Target

__all__ = [
    "FORMATS",
    "Held",
    "QuantizedLinear",
    "check_quantizable",
    "hold",
    "import_bitsandbytes",
    "mark_of",
    "plain_base",
    "quantize_base",
    "quantized_bases",
    "rounded",
    "values",
]

FORMATS = ("nf4", "fp4")
"""What bitsandbytes has on CPU and CUDA alike."""
_OLDEST = "0.50.0"  # 0.46 quantizes little on CPUs
_INSTALL = "pip install 'lightning-stable[bitsandbytes]'"
_BLOCK = 64  # weights that share a scale, bitsandbytes' own choice


class Held(NamedTuple):
    """A matrix in 4 bits.

    Attributes:
        codes: uint8, shape (half of out * in, 1): two codes a byte, in the order of rows; after an odd number of
            weights comes a 0.
        scales: float32, one for each 64 weights in the order of rows: the largest magnitude among them.
    """

    codes: Tensor
    scales: Tensor


def import_bitsandbytes(owner: str) -> Any:
    """Return the package.

    Raises:
        ValueError: If it is not there, cannot be imported, or is too old.
    """
    try:
        package: Any = importlib.import_module("bitsandbytes")
    except Exception as error:  # a build for another device fails in its own ways
        raise ValueError(
            f"{owner}: a base in 4 bits needs bitsandbytes, which cannot be imported ({error}). Get it by: {_INSTALL}."
        ) from error
    if Version(package.__version__) < Version(_OLDEST):
        raise ValueError(
            f"{owner}: a base in 4 bits needs bitsandbytes {_OLDEST} or later, and this is {package.__version__}. Get "
            f"it by: {_INSTALL}."
        )
    return package


def hold(matrix: Tensor, form: str) -> Held:
    """Quantize a matrix (out, in) of float32, bfloat16 or float16 where it is; the same values give the same codes."""
    row = matrix.detach().reshape(1, -1)
    row = nn.functional.pad(row, (0, row.numel() % 2))
    codes, state = _package().functional.quantize_4bit(row, blocksize=_BLOCK, quant_type=form)
    return Held(codes, state.absmax)


def values(held: Held, form: str, shape: Collection[int], dtype: torch.dtype) -> Tensor:
    """Return the matrix that the codes stand for."""
    functional = _package().functional
    state = functional.QuantState(
        absmax=held.scales,
        shape=torch.Size((1, 2 * held.codes.numel())),
        blocksize=_BLOCK,
        quant_type=form,
        dtype=dtype,
    )
    found: Tensor = functional.dequantize_4bit(held.codes, state)
    return found.flatten()[: prod(shape)].view(tuple(shape))


def rounded(matrix: Tensor, form: str) -> Tensor:
    """Return a matrix (out, in) with the values that it has once it is held in 4 bits, of its dtype."""
    return values(hold(matrix, form), form, matrix.shape, matrix.dtype)


def mark_of(held: Held, form: str) -> str:
    """Return a short text that tells codes and scales from any others."""
    return f"{form}|{tell_bits(held.codes.flatten())}|{tell_bits(held.scales.view(torch.int32))}"


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen weight in 4 bits.

    The weight in floating point is made for each product, in the forward pass and again in the backward pass, and not
    kept. Not bitsandbytes' own layer, which has its scales outside of parameters and buffers, so that neither a strict
    load nor DDP finds them, and which on some CPUs computes in bfloat16 once it evaluates.

    Args:
        linear: What it takes the place of; its bias stays the same parameter.
        form: ``"nf4"`` or ``"fp4"``.

    Attributes:
        weight: The codes, see :class:`Held`.
        scales: The bits of the scales as int32, so that nothing that casts a module to another precision casts them.
        dtype: The precision of the layer when it becomes a plain one again.
    """

    def __init__(self, linear: nn.Linear, form: str) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.form = form
        self.dtype = linear.weight.dtype
        codes, scales = hold(linear.weight, form)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.int32), requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    @override
    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        product = cast(Tensor, _Product.apply(x, self))  # type: ignore[no-untyped-call]  # torch's own lack it
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @override
    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"form={self.form!r}"
        )

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, shape (out, in), in the precision of the layer or another one."""
        return values(self._held(), self.form, (self.out_features, self.in_features), dtype or self.dtype)

    def mark(self) -> str:
        """Return a short text that tells what is held from anything else."""
        return mark_of(self._held(), self.form)

    def plain(self) -> nn.Linear:
        """Return a plain layer of the same values."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.matrix(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def _held(self) -> Held:
        return Held(self.weight.detach(), self.scales.detach().view(torch.float32))

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own annotations lack it
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def quantize_base(layer: Any, form: str) -> QuantizedLinear:
    """Hold the base of an adapted layer in 4 bits from now on, and return it."""
    layer.base_layer = QuantizedLinear(layer.get_base_layer(), form)
    return cast(QuantizedLinear, layer.base_layer)


def plain_base(layer: Any) -> None:
    """Give an adapted layer a plain base of the same values, if its base is held in 4 bits."""
    base = layer.get_base_layer()
    if isinstance(base, QuantizedLinear):
        layer.base_layer = base.plain()


def quantized_bases(module: nn.Module) -> list[QuantizedLinear]:
    """Return the layers of a module that are held in 4 bits."""
    return [part for part in module.modules() if isinstance(part, QuantizedLinear)]


def check_quantizable(
    owner: str, form: str, targets: Mapping[str, Target], config: Any, trainable: Iterable[nn.Parameter] = ()
) -> None:
    """Raise ``ValueError`` if a base cannot be held in 4 bits, naming the layer and the reason."""
    import_bitsandbytes(owner)
    asked = f"init_options has quantize_residual={form!r}"
    if getattr(config, "use_dora", False):
        raise ValueError(
            f"{owner}: {asked}, and config has use_dora, which scales the rows of a base that is another one now. "
            "Leave out one of the two."
        )
    train = {id(parameter) for parameter in trainable}
    for name, target in targets.items():
        why = _why_not(target.layer, train)
        if why is not None:
            raise ValueError(
                f"{owner}: {asked}, and layer {name!r} {why}. Leave the layer out of target_modules, or leave out "
                "quantize_residual."
            )


def _why_not(layer: nn.Module, trainable: Collection[int]) -> str | None:
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}: only torch.nn.Linear itself is held in 4 bits"
    if layer.weight.dtype == torch.float64:
        return "is in float64, which bitsandbytes does not take"
    if id(layer.weight) in trainable:
        return "has a weight that trainable names: in 4 bits it cannot train"
    return None


class _Product(torch.autograd.Function):
    """The product with a weight in 4 bits, of which nothing is kept for the backward pass but the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        """Return the product, shape (..., out)."""
        ctx.layer = layer
        return nn.functional.linear(x, layer.matrix(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the input."""
        return gradients[0] @ ctx.layer.matrix(gradients[0].dtype), None


def _package() -> Any:
    return importlib.import_module("bitsandbytes")
