"""Exponent biases for the weights and the inputs of each layer, searched on the first batches (LLM-FP4)."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_stable._glue.progress import follow
from lightning_stable._glue.quiet import QuietPass, own_loss
from lightning_stable.functional._simulated_layers import Quantized
from lightning_stable.functional.exponent_bias import BiasTable, add_output_errors, bias_errors, new_table
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import LayerQuantization, quantized_layers
from lightning_stable.precision._first_batch import all_layers, why_not_again
from lightning_stable.precision._parts import Part

__all__ = ["BiasSearch"]

# How many biases are tried, as in the paper, and on how many rows of the inputs of a batch products are compared.
CANDIDATES = 100
ROWS = 512
# Of a layer: what is known of its weights and of its inputs; ``None`` where there is nothing to search.
_Tables = list[BiasTable | None]


class BiasSearch(Part):
    """Searches the biases with the least error, in a pass beside training over each of the first batches.

    Args:
        owner: The class that is named in messages.
        forward_context: The precision's context for a forward pass.
        batches: On how many batches of a fit.
        metric: ``"output"`` or ``"tensor"``: see :mod:`lightning_stable.functional.exponent_bias`.
    """

    def __init__(self, owner: str, forward_context: Callable[[], Any], batches: int, metric: str) -> None:
        super().__init__(owner)
        self._forward_context = forward_context
        self._batches = batches
        self._metric = metric
        self._done = 0
        self._tables: dict[str, _Tables] = {}
        self._biases: dict[str, list[float | None]] = {}

    @override
    def begin(self, pl_module: LightningModule) -> None:
        why_not = why_not_again(pl_module)
        if why_not is not None:
            raise ValueError(f"search_bias of {self._owner} needs a pass of its own over batches, and {why_not}.")

    @override
    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._done >= self._batches:
            return
        with follow(trainer, f"{self._owner}: search of exponent biases", len(quantized_layers(pl_module))) as advance:
            self._look(pl_module, batch, batch_idx, advance)
        self._done += 1
        found = {name: [None if t is None else t.best for t in tables] for name, tables in self._tables.items()}
        # Each process has seen other batches.
        self._biases = trainer.strategy.broadcast(found)
        if self._done >= self._batches:
            self._tables = {}
        self.apply(pl_module)

    @override
    def apply(self, module: nn.Module) -> None:
        for name, state in quantized_layers(module).items():
            for operand, bias in zip(("weights", "activations"), self._biases.get(name, ()), strict=False):
                quantizer: Quantizer | None = getattr(state, operand)
                if quantizer is not None and bias is not None:
                    setattr(state, operand, replace(quantizer, exponent_bias=bias))

    @override
    def state_dict(self) -> dict[str, Any]:
        tables = {name: [None if t is None else list(t) for t in both] for name, both in self._tables.items()}
        return {"biases": self._biases, "bias_batches": self._done, "bias_tables": tables}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._biases = dict(state.get("biases", {}))
        self._done = int(state.get("bias_batches", 0))
        tables = state.get("bias_tables", {})
        self._tables = {name: [None if t is None else BiasTable(*t) for t in both] for name, both in tables.items()}

    def _look(self, pl_module: LightningModule, batch: Any, batch_idx: int, advance: Callable[[], None]) -> None:
        """Add the errors of one batch to the tables; ``advance`` is called after each layer."""
        layers = quantized_layers(pl_module)
        handles = []
        for name, state in layers.items():
            layer = pl_module.get_submodule(name)
            tables = self._tables.setdefault(name, [None, None])
            if self._metric == "tensor" and state.weights is not None and tables[0] is None:
                tables[0] = _with_tensor(None, cast(Tensor, layer.weight).detach(), state.weights)
            handles.append(
                layer.register_forward_pre_hook(self._at_first_input(name, state, advance), with_kwargs=True)
            )
        try:
            with (
                torch.compiler.set_stance("force_eager"),
                QuietPass()(pl_module),
                self._forward_context(),
                all_layers(layers, enabled=False),
                torch.no_grad(),
            ):
                own_loss(pl_module, batch, batch_idx)
        finally:
            for handle in handles:
                handle.remove()

    def _at_first_input(self, name: str, state: LayerQuantization, advance: Callable[[], None]) -> Callable[..., None]:
        seen: list[str] = []

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = (inputs[0] if inputs else named["input"]).detach()
            if seen or not x.numel() or not isinstance(layer, Quantized):
                return
            seen.append(name)
            tables = self._tables[name]
            if self._metric == "output":
                self._tables[name] = _with_output(tables, layer, state, x)
            elif state.activations is not None:
                tables[1] = _with_tensor(tables[1], x, state.activations)
            advance()

        return hook


def _with_tensor(table: BiasTable | None, x: Tensor, quantizer: Quantizer) -> BiasTable:
    table = new_table(x, quantizer.format, CANDIDATES) if table is None else table
    return table.plus(bias_errors(x, quantizer.format, table.biases))


def _with_output(tables: _Tables, layer: Quantized, state: LayerQuantization, x: Tensor) -> _Tables:
    weight = cast(Tensor, layer.weight).detach()
    x = layer.samples(x, ROWS).to(weight.dtype)

    def begun(operand: Tensor, quantizer: Quantizer | None, table: BiasTable | None) -> BiasTable | None:
        if quantizer is None or table is not None:
            return table
        return new_table(operand, quantizer.format, CANDIDATES)

    def rounded(which: str, quantizer: Quantizer | None) -> Callable[[float | None], Tensor]:
        # Remembered once, since one of the two operands stays while the other one is tried.
        @lru_cache(maxsize=1)
        def at(bias: float | None) -> Tensor:
            tried = quantizer and bias is not None and replace(quantizer, exponent_bias=bias, rounding="nearest")
            return layer.rounded(which, x, tried or None)

        return at

    low_weight, low_input = rounded("weights", state.weights), rounded("activations", state.activations)
    # In the precision of the weights: rounding to bfloat16 would hide what formats of more bits differ in.
    with torch.autocast(x.device.type, enabled=False):
        found = add_output_errors(
            lambda weight_bias, input_bias: layer.product(low_input(input_bias), low_weight(weight_bias)),
            begun(weight, state.weights, tables[0]),
            begun(x, state.activations, tables[1]),
        )
    return list(found)
