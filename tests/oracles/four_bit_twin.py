"""Four bits a weight, written once more: the tables by hand, block by block, the nearest value by comparison."""

import torch
from torch import Tensor

# Quantiles of a normal distribution as QLoRA has them; and one sign, two bits of exponent, one of mantissa.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_HALF = tuple(value / 12 for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
TABLES = {"nf4": NF4, "fp4": tuple(sorted({*_HALF, *(-value for value in _HALF)}))}


def rounded(matrix: Tensor, form: str = "nf4") -> Tensor:
    """Return a matrix (out, in) with the values that four bits can say, of its dtype."""
    table = torch.tensor(TABLES[form], dtype=torch.float64)
    blocks = []
    for block in matrix.detach().double().flatten().split(64):
        largest = block.abs().max()
        nearest = (block.unsqueeze(1) / largest - table).abs().argmin(1)
        blocks.append(table[nearest] * largest)
    return torch.cat(blocks).view(matrix.shape).to(matrix.dtype)


def starts(weight: Tensor, rank: int, form: str, rounds: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return what the adapter adds and the base after each round of QPiSSA, by full decompositions: both (out, in)."""
    source, found_so_far = weight.double(), []
    for _ in range(rounds):
        left, found, right = torch.linalg.svd(source, full_matrices=False)
        product = left[:, :rank] * found[:rank] @ right[:rank]
        base = rounded((weight.double() - product).to(weight.dtype), form)
        source = weight.double() - base.double()
        found_so_far.append((product, base.double()))
    return found_so_far
