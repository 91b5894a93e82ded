"""What the models and configurations of LoLDU and SVFit share: settings, which layers can be adapted, export."""

import zlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from lightning_stable.functional._settings import check_count
from lightning_stable.peft._diagonal_layer import DiagonalLayer, LoRAFactors
from lightning_stable.peft._targets import why_passed_by

__all__ = ["DiagonalConfig", "DiagonalModel", "as_lora"]


@dataclass
class DiagonalConfig(PeftConfig):  # type: ignore[misc]  # peft has no types
    """Settings that both tuners have; those of PEFT's own mean what they mean there.

    Args:
        r: Components that are trained, at most the smaller side of each layer.
        target_modules: Names of the layers, a regular expression, or "all-linear".
        exclude_modules: Names, or a regular expression, of layers to leave out.
        rank_pattern: Other ranks, by the layers' names or regular expressions.
        layers_to_transform: Numbers of the blocks whose layers are adapted.
        layers_pattern: Name of the list of blocks.
        modules_to_save: Modules that are trained and saved as a whole.
        save_factors: Keep the frozen factors in the saved adapter, which is then of the size of LoRA's and loads
            exactly on any machine. Without them a few numbers a layer are saved, and the factors are computed from
            the base again; other factors than before are an error at loading.
        seed: Of the random numbers that a start may need.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    save_factors: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r, 1, "components")
        check_count("seed", self.seed, 0, "a generator")
        for name, rank in self.rank_pattern.items():
            check_count(f"the rank of {name!r} in rank_pattern", rank, 1, "components")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} names the list of blocks that layers_to_transform counts in, "
                "which is not given. Set both, or neither."
            )
        # As PEFT's own do: a list becomes a set, and a string stays a regular expression.
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))

    def scale_of(self, rank: int) -> float:
        """Return the factor of the product of a layer of this rank."""
        return 1.0

    @property
    def trains_scale(self) -> bool:
        """Whether the factor of the product is trained too."""
        return False


class DiagonalModel(BaseTuner):  # type: ignore[misc]  # peft has no types
    """Base of the models whose layers train a diagonal.

    Attributes:
        layer_cls: What replaces a layer.
    """

    layer_cls: ClassVar[type[DiagonalLayer]]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @override
    def _prepare_model(self, peft_config: DiagonalConfig, model: nn.Module) -> None:
        # Before any layer is replaced: an error leaves the model as it was.
        _maybe_include_all_linear_layers(peft_config, model)
        within = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if name and not name.startswith(within) and self._check_target_module_exists(peft_config, name):
                self._check_layer(peft_config, name, module, model.get_submodule(name.rpartition(".")[0]))
                if not bool(cast(Any, module).weight.isfinite().all()):
                    raise ValueError(
                        f"{type(self).__name__}: layer {name!r} has a weight with values that are not finite. Look "
                        "for what made them nan or infinite."
                    )

    @override
    def _check_new_adapter_config(self, config: DiagonalConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            if other.save_factors != config.save_factors:
                raise ValueError(
                    f"{type(self).__name__}: save_factors={config.save_factors} of the new adapter is not that of "
                    f"adapter {name!r}, and the layers keep the factors of all adapters alike. Set both to the same."
                )

    @override
    def _create_and_replace(
        self,
        peft_config: DiagonalConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        self._check_layer(peft_config, current_key, target, parent)
        rank = _rank_of(peft_config, current_key)
        # Each layer draws its own random numbers, the same ones wherever the model is built.
        seed = peft_config.seed + zlib.crc32(current_key.encode())
        if isinstance(target, self.layer_cls):
            target.update_layer(adapter_name, rank, peft_config, seed)
            return
        layer = self.layer_cls(target, adapter_name, rank, peft_config, seed)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @override
    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        uses: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            uses.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
        for name, module in self.model.named_modules():
            if isinstance(module, self.layer_cls) and len(used := uses[id(module.get_base_layer().weight)]) > 1:
                raise ValueError(
                    f"{type(self).__name__}: the weight of {name!r} is shared ({', '.join(used)}), so merging the "
                    "adapter would change the others too. Keep it unmerged, or untie the weights first."
                )

    def _check_layer(self, config: DiagonalConfig, name: str, layer: nn.Module, parent: nn.Module) -> None:
        """Raise ``ValueError`` unless an adapter can be added to the layer of this name."""
        base: Any = layer.get_base_layer() if isinstance(layer, self.layer_cls) else layer
        reason = _why_no_layer(base, parent) or _why_no_weight(base.weight)
        if reason is None and _rank_of(config, name) > min(base.weight.shape):
            reason = (
                f"has a weight of shape {tuple(base.weight.shape)}, and rank {_rank_of(config, name)} is above its "
                f"smaller side. Choose at most {min(base.weight.shape)} for it (rank_pattern), or leave it out "
                "(exclude_modules)."
            )
        if reason:
            raise ValueError(f"{type(self).__name__}: layer {name!r} {reason}")


@torch.no_grad()
def as_lora(model: nn.Module, adapter_name: str = "default") -> dict[str, LoRAFactors]:
    """Return what an adapter of LoLDU or SVFit changes as LoRA factors, of each layer's own rank.

    A LoRA adapter on the same base with these factors, and ``lora_alpha`` equal to the rank times ``scaling``, computes
    the same function up to rounding.

    Args:
        model: With the adapter in it, unmerged or not.
        adapter_name: Name of the adapter.

    Returns:
        By the names that the layers have in the model.

    Raises:
        ValueError: If no layer has an adapter of that name.
    """
    found = {
        name: module.as_lora(adapter_name)
        for name, module in model.named_modules()
        if isinstance(module, DiagonalLayer) and adapter_name in module.r
    }
    if not found:
        raise ValueError(
            f"as_lora: no layer of {type(model).__name__} has an adapter {adapter_name!r} of LoLDU or SVFit. Give the "
            "model that the adapter was put into, and the adapter's name."
        )
    return found


def _rank_of(config: DiagonalConfig, name: str) -> int:
    """Return the rank of the layer of this name."""
    pattern: str = get_pattern_key(config.rank_pattern.keys(), name)
    return config.rank_pattern.get(pattern, config.r)


def _why_no_layer(layer: nn.Module, parent: nn.Module) -> str | None:
    """Return why an adapter in the place of a layer would not work, or not be asked, if so."""
    passed_by = why_passed_by(layer, parent)
    if passed_by is None and not isinstance(layer, (nn.Linear, Conv1D)):
        return f"is of type {type(layer).__name__}; only Linear and transformers' Conv1D can be adapted. Leave it out."
    return passed_by


def _why_no_weight(weight: Any) -> str | None:
    """Return why a weight cannot be decomposed, if so."""
    if not isinstance(weight, nn.Parameter):
        return "computes its weight from others (a parametrization). Remove that first, or leave the layer out."
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_floating_point():
        return (
            f"has a weight of kind {type(weight.data).__name__} and {weight.dtype}: quantised and sharded weights "
            "cannot be decomposed. Load the model in floating point, and add adapters before it is sharded."
        )
    if weight.device.type == "meta" or weight.numel() == 0:
        return "has no values here: its weight is on the meta device, or sharded. Load the weights first."
    return None
