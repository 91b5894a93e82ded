"""How adapters train, from their equations: an adapted weight is a function of few numbers, and the rest is frozen.

Each kind starts from a full decomposition by torch, or by elimination in plain Python. The gradient of the weight goes
to the numbers that train by the chain rule, and plain SGD with momentum moves them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from oracles.loldu_twin import ldu
from torch import Tensor

Named = dict[str, Tensor]

__all__ = ["Adapted", "Descent", "clipped", "loldu", "lora", "svfit"]


class Adapted(NamedTuple):
    """A weight with an adapter.

    Attributes:
        trained: What trains, by its name within the layer, at the start.
        weight: The weight of shape (out, in) that the layer has with given numbers.
        matched: Whether the decomposition gives the numbers themselves, and not up to signs only.
    """

    trained: Named
    weight: Callable[[Named], Tensor]
    matched: bool

    def gradients(self, numbers: Named, gradient: Tensor) -> Named:
        """Return the gradients of given numbers from that of the weight."""
        leaves = {name: value.double().requires_grad_() for name, value in numbers.items()}
        found = torch.autograd.grad(self.weight(leaves), list(leaves.values()), gradient.double())
        return dict(zip(leaves, found, strict=True))


def lora(weight: Tensor, rank: int, scale: float) -> Adapted:
    """Return W_res + s B A, started from the leading singular vectors (PiSSA)."""
    w = weight.double()
    u, sizes, vt = torch.linalg.svd(w, full_matrices=False)
    root = (sizes[:rank] / scale).sqrt()
    a, b = root[:, None] * vt[:rank], u[:, :rank] * root
    residual = w - scale * b @ a
    return Adapted(
        {"lora_A.default.weight": a, "lora_B.default.weight": b},
        lambda now: residual + scale * now["lora_B.default.weight"] @ now["lora_A.default.weight"],
        matched=False,
    )


def svfit(weight: Tensor, rank: int, scale: float) -> Adapted:
    """Return W_res + U_r diag(z) V_r, started from the leading singular values; the scale is always 1."""
    w = weight.double()
    u, sizes, vt = torch.linalg.svd(w, full_matrices=False)
    residual = w - u[:, :rank] * sizes[:rank] @ vt[:rank]
    return Adapted(
        {"svfit_vector.default": sizes[:rank]},
        lambda now: residual + u[:, :rank] * now["svfit_vector.default"] @ vt[:rank],
        matched=True,
    )


def loldu(weight: Tensor, rank: int, scale: float) -> Adapted:
    """Return W_res + s P L_r diag(z) U_r, started from the leading diagonal of the decomposition."""
    w = weight.double()
    order, lower, diagonal, upper = ldu(w.tolist())
    left = torch.zeros(len(order), rank, dtype=torch.float64)
    left[order] = torch.tensor(lower, dtype=torch.float64)[:, :rank]
    right, start = torch.tensor(upper[:rank], dtype=torch.float64), torch.tensor(diagonal[:rank], dtype=torch.float64)
    residual = w - scale * left * start @ right
    return Adapted(
        {"loldu_vector.default": start},
        lambda now: residual + scale * left * now["loldu_vector.default"] @ right,
        matched=True,
    )


def clipped(gradients: Named, limit: float | None) -> Named:
    """Return gradients of at most this norm, all of them together."""
    if limit is None:
        return gradients
    norm = torch.stack([value.double().norm() for value in gradients.values()]).norm()
    share = min(1.0, limit / (float(norm) + 1e-6))
    return {name: value * share for name, value in gradients.items()}


class Descent:
    """SGD with momentum over numbers with names, in float64.

    Args:
        start: Where it begins.
        momentum: Share of the last movement that is kept.
    """

    def __init__(self, start: Named, momentum: float) -> None:
        self.numbers = {name: value.double().clone() for name, value in start.items()}
        self.momentum = momentum
        self.averages: Named = {}

    def step(self, gradients: Named, rates: dict[str, float]) -> None:
        """Take one step at a rate for each of the numbers."""
        for name, gradient in gradients.items():
            before = self.averages.get(name)
            kept = gradient.double() if before is None else self.momentum * before + gradient.double()
            self.averages[name] = kept
            self.numbers[name] = self.numbers[name] - rates[name] * kept
