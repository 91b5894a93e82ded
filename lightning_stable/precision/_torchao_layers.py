"""Linear layers that compute through torchao: which ones, switched in place, and checked.

torchao would put new modules in the place of the old ones. Here a layer keeps its identity and changes its class, as
torchao itself does for int8: parameters, ties, hooks and names in the state dict stay what they are, and a layer can be
switched back at any step.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, pad

from lightning_stable.functional.simulated import matches

__all__ = ["Choice", "LayerSwitch", "Sample", "choose_layers", "probe", "sample_of"]

# How many names a message lists.
_MOST_NAMES = 20
# Samples of the probe: a number that every kernel takes.
_PROBE_ROWS = 32
# What a probe may be off by, relative to the norm of the exact result. Eight bits are off by about 0.04; nonsense by 1.
_MOST_ERROR = 0.5
_CLASSES: dict[tuple[type, type], type[nn.Linear]] = {}
_RESULTS = ("output", "gradient of the input", "gradient of the weight")


class LowBitLinear(nn.Linear):
    """What stands in front of torchao's forward pass; the class of a switched layer has torchao's class behind it.

    It gives torchao a contiguous matrix with as many rows as its kernels take, in the dtype of autocast on this device
    (torchao asks for that of the GPU alone) and outside of inference mode, and leaves an empty batch to the ordinary
    layer.

    Attributes:
        row_multiple: Rows of zeros are added up to a multiple of this; they change no scale and no gradient.
    """

    row_multiple: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name that nn.Linear has
        """Return the layer's output: ``input`` (..., in features) to (..., out features)."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))  # noqa: A001  the name that nn.Linear has
        if input.numel() == 0:
            return linear(input, self.weight, self.bias)
        rows = input.reshape(-1, input.shape[-1])
        missing = -rows.shape[0] % self.row_multiple
        output = self._multiply(pad(rows, (0, 0, 0, missing)) if missing else rows)
        output = output[: rows.shape[0]] if missing else output
        return output.reshape(*input.shape[:-1], output.shape[-1])

    def _multiply(self, rows: Tensor) -> Tensor:
        # What compiles cannot ask for the mode, and needs no other one.
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return super().forward(rows)
        # The host validates in inference mode, in which torchao cannot reshape scales of rows.
        with torch.inference_mode(False), torch.no_grad():
            return super().forward(rows)


class Sample(NamedTuple):
    """What torchao makes of a linear layer.

    Attributes:
        kind: Its class.
        attributes: What its modules have beside those of ``nn.Linear``.
        products: Which of the three matrix products are in low precision: those that give the output, the gradient of
            the input and the gradient of the weight.
    """

    kind: type[nn.Linear]
    attributes: Mapping[str, Any]
    products: tuple[bool, bool, bool]


def sample_of(converted: nn.Module, row_multiple: int, products: tuple[bool, bool, bool]) -> Sample:
    """Return what torchao has made of the only layer in ``converted``, whose kernels take a multiple of rows."""
    (layer,) = converted.children()
    usual = vars(nn.Linear(1, 1, device="meta"))
    attributes = {name: value for name, value in vars(layer).items() if name not in usual}
    kind = type(layer)
    if kind is nn.Linear or not issubclass(kind, nn.Linear):
        raise RuntimeError(f"torchao was asked to convert a linear layer and made a {kind.__name__} of it.")
    return Sample(kind, {**attributes, "row_multiple": row_multiple}, products)


class LayerSwitch:
    """A linear layer that computes in high or in low precision.

    Args:
        module: The layer; :meth:`turn` changes its class.
        sample: What torchao makes of such a layer.

    Attributes:
        on: Whether the layer computes in low precision at present.
    """

    def __init__(self, module: nn.Linear, sample: Sample) -> None:
        self.module = module
        self.on = False
        self._sample = sample
        self._high = type(module)
        self._low = _low_class(sample.kind, self._high)
        self._hidden = {name: vars(module)[name] for name in sample.attributes if name in vars(module)}

    def turn(self, on: bool) -> None:
        """Let the layer compute in low precision, or as it did before."""
        if on == self.on:
            return
        self.on = on
        attributes = vars(self.module)
        if on:
            attributes.update(self._sample.attributes)
        else:
            for name in self._sample.attributes:
                attributes.pop(name, None)
            attributes.update(self._hidden)
        self.module.__class__ = self._low if on else self._high


def _low_class(kind: type[nn.Linear], high: type[nn.Linear]) -> type[nn.Linear]:
    """Return the class of a layer that computes through torchao's ``kind`` and was of the class ``high``.

    The same one for all such layers, as ``torch.compile`` looks at classes.
    """
    if (kind, high) not in _CLASSES:
        # A strategy that shards may have made a class of its own of a layer's, whose methods stay.
        bases = (LowBitLinear, kind) if high is nn.Linear else (LowBitLinear, kind, high)
        _CLASSES[kind, high] = type(kind.__name__, bases, {})
    return _CLASSES[kind, high]


class Choice(NamedTuple):
    """Which linear layers of a module to convert.

    Attributes:
        layers: Those to convert, by name.
        left_out: Why each of the others is not, by name.
    """

    layers: dict[str, nn.Linear]
    left_out: dict[str, str]


def choose_layers(
    owner: str, root: nn.Module, include: Sequence[str], exclude: Sequence[str], width_multiple: int
) -> Choice:
    """Choose the linear layers whose names match a pattern of ``include`` and none of ``exclude``.

    Args:
        owner: Who asks, for messages.
        root: The module.
        include: Patterns as of file names, over the dotted names.
        exclude: Patterns of what is left out all the same.
        width_multiple: Both widths of a layer have to be multiples of it.

    Raises:
        ValueError: If there is no linear layer, a pattern of ``include`` matches none, or none is left.
    """
    found = {_plain(name): module for name, module in root.named_modules() if isinstance(module, nn.Linear)}
    there = ", ".join(f"{name} ({m.in_features} to {m.out_features})" for name, m in list(found.items())[:_MOST_NAMES])
    there += ", …" if len(found) > _MOST_NAMES else ""
    if not found:
        raise ValueError(f"{owner} converts linear layers, and {type(root).__name__} has none.")
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"{owner}: include={pattern!r} matches no linear layer. Those of {type(root).__name__} are {there}."
            )
    attention = {id(m.out_proj) for m in root.modules() if isinstance(m, nn.MultiheadAttention)}
    layers, left_out = {}, {}
    for name, module in found.items():
        if not matches(name, include):
            continue
        reason = _reason(name, module, exclude, width_multiple, in_attention=id(module) in attention)
        if reason:
            left_out[name] = reason
        else:
            layers[name] = module
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:_MOST_NAMES])
        raise ValueError(
            f"{owner}: include={list(include)} and exclude={list(exclude)} leave no linear layer to convert. "
            f"Those of {type(root).__name__} are {there}. Left out are {reasons}."
        )
    return Choice(layers, left_out)


def _reason(name: str, module: nn.Linear, exclude: Sequence[str], multiple: int, *, in_attention: bool) -> str:
    """Return why a layer that is included cannot or shall not be converted; empty if it can."""
    for pattern in exclude:
        if fnmatchcase(name, pattern):
            return f"excluded by {pattern!r}"
    if in_attention:
        return "nn.MultiheadAttention multiplies with its weight itself"
    if type(module).forward is not nn.Linear.forward:
        return f"a {type(module).__name__} with a forward pass of its own"
    if module.in_features % multiple or module.out_features % multiple:
        return f"{module.in_features} to {module.out_features} are no multiples of {multiple}"
    return ""


def _plain(name: str) -> str:
    """Return a name without what ``torch.compile`` of a part adds to it."""
    return name.replace("_orig_mod.", "")


def probe(owner: str, name: str, module: nn.Linear, sample: Sample) -> None:
    """Check that a layer, converted, quantizes, and is near the exact one in its output and both gradients.

    A copy that shares the weight computes, so that no hook of the layer runs; in place of a sharded weight it has
    random numbers.

    Raises:
        RuntimeError: If torchao fails, computes exactly as without it, or computes nonsense.
    """
    weight = _own(module.weight.detach())
    # A bias is added in high precision.
    twin = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    twin.weight = nn.Parameter(weight)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(_PROBE_ROWS, width, generator=generator).to(weight) for width in weight.shape[::-1]]
    with torch.inference_mode(False), torch.enable_grad():
        exact = _results(twin, *rows)
        LayerSwitch(twin, sample).turn(True)
        try:
            found = _results(twin, *rows)
        except Exception as error:
            raise RuntimeError(f"{owner}: torchao cannot compute {name} ({module}): {error}") from error
    for what, low, high, wanted in zip(_RESULTS, found, exact, sample.products, strict=True):
        norm, distance = float(high.norm()), float((low - high).norm())
        # Weights of zero have nothing to round, and those that are not finite are not this check's concern.
        if wanted and norm > 0 and torch.equal(low, high):
            raise RuntimeError(
                f"{owner}: torchao does not quantize {name}: the {what} is bit for bit that of the ordinary layer. Use "
                "another version of torchao, or SimulatedPrecision."
            )
        if math.isfinite(norm) and not distance <= _MOST_ERROR * norm:
            raise RuntimeError(
                f"{owner}: the {what} of {name} ({module.in_features} to {module.out_features}) is off by "
                f"{distance:.3g} on a probe, of a norm of {norm:.3g}. Leave the layer out by exclude."
            )


def _own(parameter: Tensor) -> Tensor:
    """Return a tensor to compute with; random numbers in the place of one that is spread over processes."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.to_local()
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(local)


def _results(layer: nn.Linear, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of a layer and the gradients of its input and its weight."""
    x = x.detach().requires_grad_()
    output = layer(x)
    found = (output, *torch.autograd.grad(output, (x, layer.weight), gradient))
    return found[0].detach().float(), found[1].float(), found[2].float()
