r"""Searching the real-valued exponent biases of a layer, over one batch or several (LLM-FP4, arXiv 2310.16836).

For each candidate of an operand an error is added up over batches, and the candidate of the least one is taken. By the
metric ``"tensor"`` it is that of the operand itself, :math:`\|Q_b(x) - x\|^2`; by ``"output"`` that of the layer's
product, :math:`\|Q_b(x)\,Q_c(W)^\top - x W^\top\|^2`. There weights and inputs take turns: in each of three rounds one
is searched beside the other at its best bias so far, first of all with the largest value of the format at the largest
magnitude. With one batch that is the paper's search. Errors of a further batch are added to those of earlier ones,
which were taken beside the biases of then: our reconstruction, unverified. The candidates, at even steps of the largest
magnitude, are those of the first batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._formats import Format, exponent_bias, parse_format
from lightning_stable.functional._quantizer import REACH
from lightning_stable.functional._rounding import round_saturated

__all__ = ["METRICS", "BiasTable", "add_output_errors", "bias_candidates", "bias_errors", "new_table"]

METRICS = ("output", "tensor")
ROUNDS = 3


class BiasTable(NamedTuple):
    """What is known of the exponent bias of one operand.

    Attributes:
        biases: The candidates.
        errors: The squared error of each, so far.
        first: The bias that puts the largest value of the format at the largest magnitude.
    """

    biases: list[float]
    errors: list[float]
    first: float

    @property
    def best(self) -> float:
        """The candidate with the least error, of equal ones the first; of errors that are not numbers none is."""
        known = [math.inf if math.isnan(error) else error for error in self.errors]
        return self.biases[known.index(min(known))]

    def plus(self, errors: Tensor) -> "BiasTable":
        """Return the table with the errors of one more batch; waits for the device."""
        more = errors.double().tolist()
        return self._replace(errors=[a + b for a, b in zip(self.errors, more, strict=True)])


@torch.no_grad()
def bias_candidates(x: Tensor, format: str, candidates: int = 100) -> list[float]:  # noqa: A002
    """Return biases that put the largest value of a format at even steps from 0.01 to 1.2 times that of ``x``.

    Waits for the device. Without any finite entry but zeros the format's own bias is the one candidate.

    Raises:
        ValueError: If ``format`` is not a plain float format.
    """
    shares = [0.01 + 1.19 * i / max(candidates - 1, 1) for i in range(candidates)]
    return _biases_at(shares, x, _float_format(format))


@torch.no_grad()
def bias_errors(x: Tensor, format: str, biases: list[float]) -> Tensor:  # noqa: A002
    """Return the squared error of the finite entries of ``x`` at each bias, float64 of shape (biases)."""
    spec = _float_format(format)
    # In float64, where no scale leaves the range.
    work = x.double()
    work = work[work.isfinite()]
    scales = [2.0 ** (exponent_bias(spec) - bias) for bias in biases]
    errors = [round_saturated(work / s, spec, "nearest", None).mul_(s).sub_(work).square_().sum() for s in scales]
    return torch.stack(errors)


def new_table(x: Tensor, format: str, candidates: int = 100) -> BiasTable:  # noqa: A002
    """Return the candidates for an operand, without errors yet."""
    biases = bias_candidates(x, format, candidates)
    return BiasTable(biases, [0.0] * len(biases), _biases_at([1.0], x, _float_format(format))[0])


@torch.no_grad()
def add_output_errors(
    product: Callable[[float | None, float | None], Tensor],
    weights: BiasTable | None,
    inputs: BiasTable | None,
) -> tuple[BiasTable | None, BiasTable | None]:
    """Add the errors of one batch in the layer's product, by turns.

    Args:
        product: Returns the product for a bias of the weights and one of the inputs; the exact one for ``None`` twice.
        weights: What is known of the weights' bias; ``None`` if they are not quantized, and their bias is then.
        inputs: The same of the inputs.

    Returns:
        The two tables after this batch.
    """
    exact = product(None, None)
    given = (weights, inputs)
    found = [weights, inputs]
    best = [None if table is None else table.best if any(table.errors) else table.first for table in given]
    for _ in range(ROUNDS):
        for operand, table in enumerate(given):
            if table is None:
                continue
            errors = []
            for bias in table.biases:
                best[operand] = bias
                errors.append((product(*best) - exact).double().square().sum())
            # In the place of what an earlier round has added.
            changed = table.plus(torch.stack(errors))
            found[operand], best[operand] = changed, changed.best
        if None in given:
            break
    return found[0], found[1]


def _biases_at(shares: list[float], x: Tensor, spec: Format) -> list[float]:
    own = float(exponent_bias(spec))
    work = x.double()
    work = work[work.isfinite()]
    top = float(work.abs().max()) if work.numel() else 0.0
    if top == 0.0:
        return [own]
    # None is farther away than a quantizer takes.
    scales = [min(max(share * top / spec.largest, 2.0**-REACH), 2.0**REACH) for share in shares]
    return [own - math.log2(scale) for scale in scales]


def _float_format(name: str) -> Format:
    spec = parse_format(name)
    if spec.kind != "float" or spec.block:
        raise ValueError(f"format={name!r} has no exponent bias to search. Choose a float format 'eXmY'.")
    return spec
