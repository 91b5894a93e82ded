"""Float8 training by torchao: the matrix products of linear layers on float8 tensor cores, emulated elsewhere.

Use it on GPUs of compute capability 8.9 or higher (NVIDIA Ada, Hopper and Blackwell), for models with wide linear
layers and with ``torch.compile``, which fuses the casts. Weights stay in high precision; inputs, weights and gradients
are cast with a scale that follows their largest value at each step. Without such a GPU the products are emulated on the
CPU, slower than in float32: good to try a recipe, and for formats of every kind there is SimulatedPrecision.

Needs torchao: ``pip install "lightning-stable[torchao]"``.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.precision.float8 import Float8Precision
    >>> precision = Float8Precision(recipe="rowwise", compute="bf16-mixed")
    >>> trainer = Trainer(plugins=[precision], logger=False, enable_checkpointing=False)
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from typing_extensions import override

from lightning_stable.functional._settings import check_choice
from lightning_stable.precision._torchao import TorchaoPrecision, check_cuda
from lightning_stable.precision._torchao_layers import Sample, sample_of

__all__ = ["Float8Precision"]

_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
# What torch's scaled product needs of each dimension that is summed over.
_MULTIPLE = 16


class Float8Precision(TorchaoPrecision):
    """Linear layers compute in float8, by one of torchao's training recipes.

    Args:
        recipe: "tensorwise": one scale a tensor, e4m3 for inputs and weights, e5m2 for gradients; the fastest.
            "rowwise": one scale a row, a power of two, all e4m3. "rowwise_with_gw_hp": as rowwise, with the gradient
            of the weight in high precision; the most exact.
        include: Patterns of names of linear layers, as of file names; each has to match one.
        exclude: Patterns of names of layers that stay in high precision all the same.
        width_multiple: Layers whose two widths are not both multiples of it stay in high precision. The kernels need a
            multiple of 16; emulation takes any.
        first_steps_high_precision: Optimizer steps, counted as ``trainer.global_step``, before the layers are
            converted.
        compute: What everything else computes in: "32-true", "bf16-true" or "bf16-mixed". In the first and the last
            the weights that are trained are in float32.
        emulate: Multiply in float32 what was cast to float8. By default on the CPU alone.

    Raises:
        ImportError: If torchao is missing, or it or torch is too old.
        ValueError: If a setting is not allowed; when training begins, for a device without float8 kernels, a strategy
            that does not go with it, and filters that leave no layer.
    """

    def __init__(
        self,
        recipe: str = "tensorwise",
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("*head*",),
        width_multiple: int = 16,
        first_steps_high_precision: int = 0,
        compute: str = "32-true",
        emulate: bool | None = None,
    ) -> None:
        check_choice("recipe", recipe, _RECIPES)
        super().__init__(
            include=include,
            exclude=exclude,
            width_multiple=width_multiple,
            first_steps_high_precision=first_steps_high_precision,
            compute=compute,
        )
        self.recipe = recipe
        self.emulate = emulate

    @override
    def _check_device(self, device: torch.device) -> None:
        if self._emulates(device):
            return
        if self.width_multiple % _MULTIPLE:
            raise ValueError(
                f"{type(self).__name__}: width_multiple={self.width_multiple} is not a multiple of {_MULTIPLE}, which "
                "the float8 kernels need. Other widths can be emulated (emulate=True)."
            )
        check_cuda(type(self).__name__, device, (8, 9), "float8", "or emulate=True, which is slow")

    @override
    def _convert_sample(self, layer: nn.Module, device: torch.device) -> Sample:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        emulate = self._emulates(device)
        config = replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=emulate)
        products = (True, True, self.recipe != "rowwise_with_gw_hp")
        return sample_of(convert_to_float8_training(layer, config=config), 1 if emulate else _MULTIPLE, products)

    @override
    def _format(self, device: torch.device) -> str:
        return f"float8 ({self.recipe}{', emulated' if self._emulates(device) else ''})"

    def _emulates(self, device: torch.device) -> bool:
        return device.type == "cpu" if self.emulate is None else self.emulate
