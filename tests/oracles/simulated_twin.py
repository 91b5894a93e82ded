"""Products of quantized operands by hand: the grid of a format listed, each value looked up, both backward products."""

import bisect
from typing import Any

import torch
from torch import Tensor, nn

TOPS = {"e4m3": 448.0, "e5m2": 57344.0}


def levels(name: str) -> list[float]:
    """List the values of ``intK`` or ``eXmY`` from 0 on; where codes stand for no number, ``TOPS`` has the largest."""
    if name.startswith("int"):
        return [float(value) for value in range(2 ** (int(name[3:]) - 1))]
    exponent_bits, mantissa_bits = (int(part) for part in name[1:].split("m"))
    bias, steps, found = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits, []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, fraction = divmod(code, steps)
        value = (min(exponent, 1) + fraction / steps) * 2.0 ** (max(exponent, 1) - bias)
        if value <= TOPS.get(name, value):
            found.append(value)
    return found


def nearest(value: float, grid: list[float]) -> float:
    """Return the entry of the grid that is nearest in magnitude, with the sign; between two the one of even number."""
    size = min(abs(value), grid[-1])
    above = bisect.bisect_left(grid, size)
    below = max(above - 1, 0)
    gap_below, gap_above = size - grid[below], grid[above] - size
    chosen = below if gap_below < gap_above or (gap_below == gap_above and below % 2 == 0) else above
    return grid[chosen] if value >= 0 else -grid[chosen]


def quantized(matrix: Tensor, recipe: tuple[str, str] | None) -> Tensor:
    """Return a matrix with each value looked up, in units of its run's scale. A recipe is a format and a scaling."""
    if recipe is None:
        return matrix
    name, scaling = recipe
    grid = levels(name)
    width = {"tensor": matrix.numel(), "row": matrix.shape[-1]}.get(scaling) or int(scaling.removeprefix("group:"))
    runs = []
    # Groups begin anew with each row; a tensor is one row.
    for row in matrix.reshape(1 if scaling == "tensor" else -1, width if scaling == "tensor" else matrix.shape[-1]):
        values = row.tolist()
        for begin in range(0, len(values), width):
            run = values[begin : begin + width]
            scale = max(abs(value) for value in run) / grid[-1] or 1.0
            runs += [nearest(value / scale, grid) * scale for value in run]
    return torch.tensor(runs, dtype=torch.float64).to(matrix.dtype).reshape(matrix.shape)


class Product(torch.autograd.Function):
    """``x W^T``, of matrices, with quantized operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipes: tuple[Any, Any, Any]) -> Tensor:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        ctx.kinds, ctx.recipe = (x.dtype, weight.dtype), recipes[2]
        own = [quantized(x, recipes[1]).to(dtype), quantized(weight, recipes[0]).to(dtype)]
        ctx.save_for_backward(*own)
        return own[0] @ own[1].t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        low = quantized(gradient, ctx.recipe)
        return (low @ weight).to(ctx.kinds[0]), (low.t() @ x).to(ctx.kinds[1]), None


class Convolution(torch.autograd.Function):
    """A convolution in two dimensions without stride, as products with the columns of what each place sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int, recipes: tuple[Any, Any, Any]) -> Tensor:
        ctx.recipe, ctx.padding, ctx.size, ctx.shape = recipes[2], padding, x.shape[-2:], weight.shape
        low = quantized(x.flatten(1), recipes[1]).view_as(x)
        rows = quantized(weight.flatten(1), recipes[0])
        columns = nn.functional.unfold(low, weight.shape[-1], padding=padding)
        ctx.save_for_backward(columns, rows)
        size = x.shape[-1] + 2 * padding - weight.shape[-1] + 1
        return (rows @ columns).reshape(len(x), len(weight), size, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        columns, rows = ctx.saved_tensors
        low = quantized(gradient.flatten(1), ctx.recipe).reshape(len(gradient), len(rows), -1)
        to_input = nn.functional.fold(rows.t() @ low, ctx.size, ctx.shape[-1], padding=ctx.padding)
        return to_input, (low @ columns.transpose(1, 2)).sum(0).view(ctx.shape), None, None


def linear(layer: nn.Linear, recipes: tuple[Any, Any, Any]) -> Any:
    """Return what a linear layer does with quantized weights, inputs and gradients of outputs."""

    def forward(x: Tensor) -> Tensor:
        found = Product.apply(x.reshape(-1, x.shape[-1]), layer.weight, recipes)
        return (found + layer.bias.to(found.dtype)).reshape(*x.shape[:-1], -1)

    return forward


def convolution(layer: nn.Conv2d, recipes: tuple[Any, Any, Any]) -> Any:
    """The same of a convolution."""
    return lambda x: Convolution.apply(x, layer.weight, layer.padding[0], recipes) + layer.bias.view(-1, 1, 1)
