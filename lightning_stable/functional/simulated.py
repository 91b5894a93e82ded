r"""Layers whose matrix products see quantized operands: low-bit training, simulated on any machine.

With the input :math:`x` (samples, ..., in), the weight :math:`W` (out, in), the bias :math:`b` and the gradient
:math:`g` of the output, and for each operand a quantizer :math:`Q_x, Q_w, Q_g` or the identity,

.. math::

    y = Q_x(x)\,Q_w(W)^\top + b, \qquad
    \partial_x = Q_g(g)\,Q_w(W), \qquad
    \partial_W = Q_g(g)^\top Q_x(x), \qquad
    \partial_b = \textstyle\sum g

and for convolutions accordingly. The weight that is trained stays as it is, the master weight: gradients pass the
quantizers of :math:`x` and :math:`W` straight through. A layer is converted by giving the module another class, in
place: parameters, buffers, hooks, names in the state dict and ties between weights stay, and :func:`restore` gives the
class back.

Scales run over each operand as a matrix. A weight has a row for each output channel, whatever the order in which the
module stores it; an input and a gradient of a convolution have a row for each sample. The backward products see the
operands of the forward product. Hardware with a scale for each block would quantize these once more along the other
dimension, which is not simulated. Under autocast the quantized values are rounded to its dtype before they multiply.

Columns of outliers (LLM.int8(), arXiv 2208.07339): with a threshold :math:`\tau`, the input features
:math:`\{j : \max_i |x_{ij}| \ge \tau\}` and their columns of the weight multiply as they are. The scales of the rest of
the input are taken without them, those of the weight with them. The form is from memory of the paper, unverified; both
backward products see the operands of the forward product, where bitsandbytes computes :math:`\partial_x` from
dequantized weights.

A fading low-rank helper beside a quantized weight (:mod:`.fading_helper`) is a part of :class:`LayerQuantization`; both
backward products see the weight with it.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_stable.functional._simulated_layers import (
    LayerQuantization,
    Observer,
    Quantized,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvolution,
    QuantizedLinear,
    QuantizedTransposed,
)
from lightning_stable.functional.quantize import Quantizer, quantize

__all__ = [
    "LayerQuantization",
    "Observer",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedLinear",
    "convert",
    "layer_names",
    "matches",
    "quantized_kind",
    "quantized_layers",
    "restore",
    "unconvertible",
]

# How many names a message lists.
_MOST_NAMES = 30

# The class that a layer of a class is given. Subclasses that multiply as their base does get one of their own.
_classes: dict[type[nn.Module], type[Quantized]] = {
    kind.plain: kind for kind in (QuantizedLinear, QuantizedConv1d, QuantizedConv2d, QuantizedConv3d)
}
_PLAIN = tuple(_classes)
_UNKNOWN = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)


def convert(
    root: nn.Module,
    *,
    weights: Quantizer | None = None,
    activations: Quantizer | None = None,
    gradients: Quantizer | None = None,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    outlier_threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Convert the linear and convolutional layers within a module, in place.

    A layer that is converted already is given the new settings, and loses its observers.

    Args:
        root: The module.
        weights: The quantizer of weights; ``None`` leaves them as they are.
        activations: The quantizer of inputs.
        gradients: The quantizer of gradients at outputs.
        include: Patterns of dotted names, as of :mod:`fnmatch`, case counts; a layer has to match one of them.
        exclude: Patterns none of which it may match. A layer with several names is excluded by any of them.
        outlier_threshold: As of :class:`LayerQuantization`.
        generator: As of :class:`LayerQuantization`.

    Returns:
        The names of the layers that were converted.

    Raises:
        ValueError: If no layer matches, or the width of one does not go with a quantizer that does not pad.
    """
    include, exclude = tuple(include), tuple(exclude)
    chosen = {name: part for name, part in _filtered(root, include, exclude).items() if not _reason(part)}
    if not chosen:
        raise ValueError(
            f"No layer of {type(root).__name__} matches include={list(include)} and none of exclude={list(exclude)}. "
            f"The layers that can be quantized are {_listed(list(layer_names(root)))}."
        )
    for name, part in chosen.items():
        _check_width(name, part, weights, activations, gradients)
    for name, part in chosen.items():
        state = LayerQuantization(
            name, weights, activations, gradients, outlier_threshold=outlier_threshold, generator=generator
        )
        part.__dict__["quantization"] = state
        part.__class__ = cast(Any, _quantized_class(type(part)))
    return list(chosen)


def restore(root: nn.Module) -> None:
    """Give every converted layer within a module its own class back."""
    for part in root.modules():
        if isinstance(part, Quantized):
            part.__class__ = cast(Any, part.plain)
            del part.__dict__["quantization"]


def quantized_layers(root: nn.Module) -> dict[str, LayerQuantization]:
    """Return how each converted layer within a module is quantized, by the name it has there; may be empty."""
    return {name: part.quantization for name, part in root.named_modules() if isinstance(part, Quantized)}


def layer_names(root: nn.Module) -> dict[str, list[str]]:
    """Return the layers within a module that can be converted: by their first names, all their names."""
    names: dict[nn.Module, list[str]] = {}
    for name, part in root.named_modules(remove_duplicate=False):
        names.setdefault(part, []).append(name)
    return {name: names[part] for name, part in _filtered(root, ("*",), ()).items() if not _reason(part)}


def unconvertible(root: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> dict[str, str]:
    """Return the layers that match but cannot be converted, by name, and why."""
    matching = _filtered(root, tuple(include), tuple(exclude))
    return {name: reason for name, part in matching.items() if (reason := _reason(part))}


def _filtered(root: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the modules that multiply by weights and match, each by its first name."""
    names: dict[nn.Module, list[str]] = {}
    inside: set[nn.Module] = set()
    for name, part in root.named_modules(remove_duplicate=False):
        if isinstance(part, nn.MultiheadAttention):
            inside |= set(part.modules()) - {part}
        if isinstance(part, (nn.MultiheadAttention, *_UNKNOWN)) or quantized_kind(type(part)) is not None:
            names.setdefault(part, []).append(name)
    return {
        own[0]: part
        for part, own in names.items()
        if part not in inside and any(matches(name, include) for name in own)
        if not any(matches(name, exclude) for name in own)
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a dotted name matches one of some patterns, as of :mod:`fnmatch`; case counts."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _reason(part: nn.Module) -> str:
    """Say why a layer cannot be converted; nothing if it can."""
    kind = part.plain if isinstance(part, Quantized) else type(part)
    if isinstance(part, nn.MultiheadAttention):
        return "nn.MultiheadAttention multiplies by its weights itself, and by those of out_proj"
    if isinstance(part, _UNKNOWN):
        return f"products of {kind.__name__} are not simulated"
    if isinstance(part.weight, UninitializedParameter):
        return "its weight has no shape before the first batch"
    own = kind.forward is not _base(kind).forward
    return f"{kind.__name__} has a forward of its own" if own else ""


def _base(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class whose way to multiply is known, among those that a class of layers comes from."""
    return next(base for base in kind.__mro__ if base in _PLAIN or _is_transposed(base))


def _is_transposed(kind: type) -> bool:
    # By its name, so that transformers is not imported.
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def quantized_kind(kind: type[nn.Module]) -> type[Quantized] | None:
    """Return what comes before a class of layers in its quantized class; ``None`` for modules that have none."""
    if issubclass(kind, nn.Linear):
        return Quantized
    if issubclass(kind, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return QuantizedConvolution
    return QuantizedTransposed if any(map(_is_transposed, kind.__mro__)) else None


def _quantized_class(kind: type[nn.Module]) -> type[Quantized]:
    if issubclass(kind, Quantized):
        return kind
    if kind not in _classes:
        own = {"plain": kind, "__module__": kind.__module__, "__doc__": f"A converted {kind.__name__}."}
        _classes[kind] = cast(Any, type)(f"Quantized{kind.__name__}", (quantized_kind(kind), kind), own)
    return _classes[kind]


def _check_width(
    name: str, part: nn.Module, weights: Quantizer | None, activations: Quantizer | None, gradients: Quantizer | None
) -> None:
    """Raise ``ValueError`` if a quantizer that does not pad cannot divide the rows of its operand.

    The rows of a convolution's input and gradient are known when they are there.
    """
    weight = cast(Tensor, part.weight)
    if any(map(_is_transposed, type(part).__mro__)):
        weight = weight.t()
    rows = weight.flatten(1)
    widths = {"weights": (weights, rows.shape[1])}
    if weight.ndim == 2:
        widths |= {"activations": (activations, rows.shape[1]), "gradients": (gradients, rows.shape[0])}
    for operand, (quantizer, width) in widths.items():
        if quantizer is None or quantizer.padding:
            continue
        try:
            quantize(torch.zeros(1, width), quantizer)
        except ValueError as error:
            raise ValueError(f"The {operand} of layer {name!r} cannot be quantized: {error}") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(repr(name) for name in names[:_MOST_NAMES]) or "none") + more
