"""Exponent biases for the weights and the inputs of each layer, searched on the first batch (LLM-FP4)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_stable._glue.quiet import QuietPass, own_loss
from lightning_stable.functional.quantize import Quantizer, search_exponent_bias
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision._first_batch import all_layers, why_not_again

__all__ = ["Biases", "apply_biases", "search_biases"]

# Of each layer by name, for its weights and its inputs; ``None`` where there is nothing to search.
Biases = dict[str, list[float | None]]


def search_biases(
    owner: str, pl_module: LightningModule, forward_context: Callable[[], Any], batch: Any, batch_idx: int
) -> Biases:
    """Return the biases with the least error on the weights and, in one pass that leaves no trace, on the inputs.

    Raises:
        ValueError: If the module's training step cannot be run besides those that count.
    """
    why_not = why_not_again(pl_module)
    if why_not is not None:
        raise ValueError(f"search_bias of {owner} needs a pass of its own over the first batch, and {why_not}.")
    layers = quantized_layers(pl_module)
    found: Biases = {name: [None, None] for name in layers}
    handles = []
    for name, state in layers.items():
        layer = pl_module.get_submodule(name)
        if state.weights is not None:
            found[name][0] = _search(layer.weight, state.weights)
        if state.activations is not None:
            hook = _at_first_input(found[name], state.activations)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            QuietPass()(pl_module),
            forward_context(),
            all_layers(layers, enabled=False),
        ):
            own_loss(pl_module, batch, batch_idx)
    finally:
        for handle in handles:
            handle.remove()
    return found


def apply_biases(module: nn.Module, biases: Biases) -> None:
    """Give the converted layers within a module these biases."""
    for name, state in quantized_layers(module).items():
        for operand, bias in zip(("weights", "activations"), biases.get(name, ()), strict=False):
            quantizer: Quantizer | None = getattr(state, operand)
            if quantizer is not None and bias is not None:
                setattr(state, operand, replace(quantizer, exponent_bias=bias))


def _at_first_input(into: list[float | None], quantizer: Quantizer) -> Callable[..., None]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = inputs[0] if inputs else named["input"]
        if into[1] is None and x.numel():
            into[1] = _search(x, quantizer)

    return hook


def _search(x: Any, quantizer: Quantizer) -> float:
    return search_exponent_bias(x.detach(), quantizer.format)
