r"""LoLDU as a PEFT tuner: train the leading diagonal of each weight's LDU decomposition.

Use it to fine-tune with some ten numbers a layer, where the adapters that are kept of many tasks have to be small. The
leading block of the decomposition is not the weight's best approximation, so it can reach less than LoRA does. Cost: a
decomposition of ``r`` columns of each weight when adapters are made; in training two products with factors of rank
``r``, as LoRA has.

Importing this module makes the tuner known to PEFT, which has to be done before an adapter of it is loaded.

Example:
    >>> import torch
    >>> from peft import get_peft_model
    >>> from lightning_stable.peft.loldu import LoLDUConfig
    >>> base = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> model = get_peft_model(base, LoLDUConfig(r=4, target_modules=["0", "2"]))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['base_model.model.0.loldu_vector.default', 'base_model.model.2.loldu_vector.default']
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from typing_extensions import override

from lightning_stable.functional._settings import check_choice, check_positive
from lightning_stable.functional.loldu import CHANGING_INITS, INITS, initial_diagonal, leading_ldu
from lightning_stable.peft._diagonal_layer import DiagonalLayer, DiagonalStart
from lightning_stable.peft._diagonal_model import DiagonalConfig, DiagonalModel, as_lora
from lightning_stable.peft._register import register_tuner

__all__ = ["LoLDUConfig", "LoLDUModel", "as_lora"]


@dataclass
class LoLDUConfig(DiagonalConfig):
    r"""Configuration of LoLDU (equations: :mod:`lightning_stable.functional.loldu`; arXiv 2410.13618).

    Args:
        alpha: The scale :math:`\sigma` is ``alpha / r`` of each layer.
        init: What the diagonal starts from: "lu", "uniform", "normal" or "constant", which leave the function as it is,
            or "s_uniform", "s_normal", "ones" or "zeros", which change it at the start.
        train_scale: Train :math:`\sigma` too, one number a layer. Whether the paper does is unclear: in its released
            code the scale is a parameter, and the filter of what is trained leaves it out.

    The other arguments are those of :class:`~lightning_stable.peft._diagonal_model.DiagonalConfig`.

    Raises:
        ValueError: At construction for a value out of range; when adapters are made for a layer that cannot be
            adapted, with its name.
    """

    alpha: float = 8.0
    init: str = "lu"
    train_scale: bool = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOLDU
        check_positive("alpha", self.alpha, "the scale times the rank")
        check_choice("init", self.init, INITS)

    @override
    def scale_of(self, rank: int) -> float:
        return self.alpha / rank

    @property
    @override
    def trains_scale(self) -> bool:
        return self.train_scale


class LoLDULayer(DiagonalLayer):
    """Base of the layers with adapters of LoLDU, by which PEFT knows them."""

    prefix = "loldu_"

    @override
    def decompose(self, weight: Tensor, rank: int, config: LoLDUConfig, generator: torch.Generator) -> DiagonalStart:
        left, diagonal, right = leading_ldu(weight, rank)
        vector, start = initial_diagonal(diagonal, config.init, generator)
        return DiagonalStart(left, vector, right, start)


class LoLDULinear(LoLDULayer):
    """A Linear or Conv1D with adapters of LoLDU; PEFT tells linear layers by the word in the name."""


class LoLDUModel(DiagonalModel):
    """A model with adapters of LoLDU; made by ``peft.get_peft_model`` with a :class:`LoLDUConfig`."""

    prefix = "loldu_"
    tuner_layer_cls = LoLDULayer
    layer_cls = LoLDULinear

    @override
    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.init in CHANGING_INITS and not peft_config.inference_mode:
            warnings.warn(
                f"LoLDUConfig: init={peft_config.init!r} starts from another function than the base model's. 'lu', "
                "'uniform', 'normal' and 'constant' start from the base model.",
                stacklevel=2,
            )


register_tuner("loldu", LoLDUConfig, LoLDUModel)
