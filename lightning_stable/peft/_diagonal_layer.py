"""The layer that LoLDU and SVFit share: a trained vector between two frozen factors of the base layer's weight.

The layer computes ``base(x) + left diag(scale * v - scale_0 * v_0) right x``. That equals the papers' form, with the
residual weight in the base and ``scale * left diag(v) right`` beside it, and leaves the stored weight as it was: with
adapters disabled the layer is the pristine one, several adapters work side by side, and a checkpoint of the base knows
nothing of them. Only merging changes the weight.

The vector and the factors are kept in float32 (float64 for a base of float64), whatever the precision of the base and
``autocast_adapter_dtype`` are: an update of a thousandth would be lost in bfloat16.
"""

import warnings
from abc import abstractmethod
from typing import Any, NamedTuple, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from lightning_stable.functional._diagonal import (
    check_probe,
    diagonal_delta,
    diagonal_output,
    diagonal_step,
    probe_factors,
)
from lightning_stable.functional._factors import working_dtype

__all__ = ["DiagonalLayer", "DiagonalStart", "LoRAFactors"]

_TRAINED = ("vector", "scale")
_FROZEN = ("left", "right", "start", "scale_start", "probe")


class DiagonalStart(NamedTuple):
    """What a layer starts from.

    Attributes:
        left: Shape (out, rank).
        vector: What is trained, shape (rank).
        right: Shape (rank, in).
        start: The diagonal in the residual, shape (rank).
    """

    left: Tensor
    vector: Tensor
    right: Tensor
    start: Tensor


class LoRAFactors(NamedTuple):
    """A layer's change of the weight as a LoRA adapter: ``scaling * b @ a``.

    Attributes:
        a: Shape (rank, in).
        b: Shape (out, rank).
        scaling: Factor of the product.
    """

    a: Tensor
    b: Tensor
    scaling: float


class DiagonalLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft has no types
    """Base of the layers that train a diagonal; a subclass says how a weight is decomposed.

    Attributes:
        prefix: Of the names of what an adapter holds, such as ``"svfit_"``; PEFT finds them by it.

    Args:
        base_layer: A Linear, or transformers' Conv1D.
        adapter_name: Name of the first adapter.
        rank: Its components.
        config: Its configuration.
        seed: Of its random numbers.
    """

    prefix = ""

    # What PEFT's base has: without its types, these would be taken for submodules.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Any
    set_adapter: Any
    _cast_input_dtype: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = tuple(f"{cls.prefix}{part}" for part in _TRAINED)
        cls.other_param_names = (*(f"{cls.prefix}{part}" for part in _FROZEN), "r", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, rank: int, config: Any, seed: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        for part in _TRAINED:
            setattr(self, f"{self.prefix}{part}", nn.ParameterDict())
        for part in _FROZEN:
            persistent = config.save_factors or part not in ("left", "right")
            setattr(self, f"{self.prefix}{part}", BufferDict(persistent=persistent))
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.out_features, self.in_features = self._matrix().shape
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, rank, config, seed)

    @abstractmethod
    def decompose(self, weight: Tensor, rank: int, config: Any, generator: torch.Generator) -> DiagonalStart:
        """Return what an adapter of a weight of shape (out, in) starts from."""

    # ------------------------------------------------------------------ adapters

    def update_layer(self, adapter_name: str, rank: int, config: Any, seed: int) -> None:
        """Add an adapter."""
        weight, vectors = self._matrix(), self._part("vector")
        self.r[adapter_name], self.scaling[adapter_name] = rank, config.scale_of(rank)
        dtype = working_dtype(weight)
        vectors[adapter_name] = nn.Parameter(torch.empty(rank, dtype=dtype))
        if config.trains_scale:
            scale = torch.full((1,), self.scaling[adapter_name], dtype=dtype)
            self._part("scale")[adapter_name] = nn.Parameter(scale)
            self._part("scale_start")[adapter_name] = scale.clone()
        # With low_cpu_mem_usage parameters are put on the meta device, and everything is loaded in their place.
        awaited = vectors[adapter_name].device.type == "meta"
        if awaited and config.save_factors:
            nothing = torch.full((), torch.nan, dtype=dtype)
            shapes = (self.out_features, rank), (rank,), (rank, self.in_features), (rank,)
            found = DiagonalStart(*(nothing.expand(shape).clone() for shape in shapes))
        else:
            found = self.decompose(weight, rank, config, torch.Generator().manual_seed(seed))
        for part in ("left", "right", "start"):
            self._part(part)[adapter_name] = getattr(found, part).to(dtype)
        if not awaited:
            vectors[adapter_name] = nn.Parameter(found.vector.to(dtype))
        if not config.save_factors:
            self._part("probe")[adapter_name] = probe_factors(found.left, found.right)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @override
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also takes the precision of the base, in which the vector would not be what it started as.
        device = self._matrix().device if device is None else device
        for part in (*_TRAINED, *_FROZEN):
            held = self._part(part)
            if adapter_name in held and held[adapter_name].device.type != "meta":
                held[adapter_name] = held[adapter_name].to(device)

    # ------------------------------------------------------------------ the function

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self._part("vector"):
                left, right = self._part("left")[name], self._part("right")[name]
                result = result + diagonal_output(self._cast_input_dtype(x, left.dtype), left, self._step(name), right)
        return result.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return an adapter's change of the weight, in the layout of the base layer's weight."""
        delta = diagonal_delta(self._part("left")[adapter], self._step(adapter), self._part("right")[adapter])
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def as_lora(self, adapter: str = "default") -> LoRAFactors:
        """Return an adapter as LoRA factors of its own rank: the same change of the weight, up to rounding."""
        a, b = self._part("right")[adapter], self._part("left")[adapter] * self._step(adapter)
        return LoRAFactors(a.detach().clone(), b.detach(), 1.0)

    @override
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @override
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self._part("vector"):
                continue
            merged = self._weight_plus(name, 1.0)
            if safe_merge and not bool(merged.isfinite().all()):
                raise ValueError(
                    f"{type(self).__name__}: the weight with adapter {name!r} merged would not be finite, so nothing "
                    "was merged. Look at the values of the adapter."
                )
            self.get_base_layer().weight.data.copy_(merged)
            self.merged_adapters.append(name)

    @override
    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn(f"{type(self).__name__}: no adapter is merged, so there is nothing to undo.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self._part("vector"):
                self.get_base_layer().weight.data.copy_(self._weight_plus(name, -1.0))

    @override
    def __repr__(self) -> str:
        return f"{self.prefix.rstrip('_')}.{super().__repr__()}"

    # ------------------------------------------------------------------ helpers

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        for name, left in self._part("left").items():
            saved = state_dict.get(f"{prefix}{self.prefix}probe.{name}")
            if saved is not None and not check_probe(saved, left, self._part("right")[name]):
                raise ValueError(
                    f"{type(self).__name__}: the factors of {prefix.rstrip('.')!r}, computed from its weight, are not "
                    f"those that adapter {name!r} was trained with: the base model is another one, its weights were "
                    "not loaded before the adapter was made, or they have another precision. Load the pristine base "
                    "first, or save with save_factors=True."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _part(self, part: str) -> Any:
        """Return the dictionary of this part of all adapters."""
        return getattr(self, f"{self.prefix}{part}")

    def _matrix(self) -> Tensor:
        """Return the base layer's weight, shape (out, in)."""
        layer = self.get_base_layer()
        weight: Tensor = layer.weight.data
        return weight.T if isinstance(layer, Conv1D) else weight

    def _step(self, name: str) -> Tensor:
        """Return how far the scaled vector is from where it started, shape (rank)."""
        if name in self._part("scale"):
            scale, scale_start = self._part("scale")[name], self._part("scale_start")[name]
        else:
            scale = scale_start = self.scaling[name]
        return diagonal_step(self._part("vector")[name], self._part("start")[name], scale, scale_start)

    def _weight_plus(self, name: str, sign: float) -> Tensor:
        """Return the base layer's weight with an adapter's change added, rounded once."""
        weight = self.get_base_layer().weight.data
        delta = self.get_delta_weight(name).to(weight.device)
        return torch.add(weight.to(delta.dtype), delta, alpha=sign).to(weight.dtype)
