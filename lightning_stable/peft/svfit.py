"""SVFit as a PEFT tuner: train the largest singular values of each weight.

Use it to fine-tune with some ten numbers a layer, along the directions that the weight already uses most. What needs
new directions is out of its reach. Cost: a singular value decomposition of each weight when adapters are made, by
default a randomised one; in training two products with factors of rank ``r``, as LoRA has.

Importing this module makes the tuner known to PEFT, which has to be done before an adapter of it is loaded.

Example:
    >>> import torch
    >>> from peft import get_peft_model
    >>> from lightning_stable.peft.svfit import SVFitConfig
    >>> base = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> model = get_peft_model(base, SVFitConfig(r=4, target_modules=["0", "2"]))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['base_model.model.0.svfit_vector.default', 'base_model.model.2.svfit_vector.default']
"""

from dataclasses import dataclass

import torch
from peft.utils.peft_types import PeftType
from torch import Tensor
from typing_extensions import override

from lightning_stable.functional._settings import check_count
from lightning_stable.functional.svfit import top_singular
from lightning_stable.peft._diagonal_layer import DiagonalLayer, DiagonalStart
from lightning_stable.peft._diagonal_model import DiagonalConfig, DiagonalModel, as_lora
from lightning_stable.peft._register import register_tuner

__all__ = ["SVFitConfig", "SVFitModel", "as_lora"]


@dataclass
class SVFitConfig(DiagonalConfig):
    """Configuration of SVFit (equations: :mod:`lightning_stable.functional.svfit`; arXiv 2409.05926).

    Args:
        iterations: Power iterations of a randomised decomposition; ``None`` for a full one, which takes far longer.

    The other arguments are those of :class:`~lightning_stable.peft._diagonal_model.DiagonalConfig`.

    Raises:
        ValueError: At construction for a value out of range; when adapters are made for a layer that cannot be
            adapted, with its name.
    """

    iterations: int | None = 4

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SVFIT
        if self.iterations is not None:
            check_count("iterations", self.iterations, 0, "power iterations (null for a full decomposition)")


class SVFitLayer(DiagonalLayer):
    """Base of the layers with adapters of SVFit, by which PEFT knows them."""

    prefix = "svfit_"

    @override
    def decompose(self, weight: Tensor, rank: int, config: SVFitConfig, generator: torch.Generator) -> DiagonalStart:
        left, values, right = top_singular(weight, rank, iterations=config.iterations, generator=generator)
        return DiagonalStart(left, values, right, values.clone())


class SVFitLinear(SVFitLayer):
    """A Linear or Conv1D with adapters of SVFit; PEFT tells linear layers by the word in the name."""


class SVFitModel(DiagonalModel):
    """A model with adapters of SVFit; made by ``peft.get_peft_model`` with a :class:`SVFitConfig`."""

    prefix = "svfit_"
    tuner_layer_cls = SVFitLayer
    layer_cls = SVFitLinear


register_tuner("svfit", SVFitConfig, SVFitModel)
