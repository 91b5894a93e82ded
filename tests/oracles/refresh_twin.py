"""A slow twin of refresh learning (arXiv 2403.13249), as released: unlearn the batch a little, then train on it.

With u how far gradient ascent on the batch goes and F the importance of each weight, tensor by tensor:
w + strength * |w| u / |u| / (1 + damping * F). Going up the loss is what forgets the batch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Named = dict[str, Tensor]


def _length(values: Tensor) -> float:
    return math.sqrt(sum(value * value for value in values.double().flatten().tolist()))


def ascended(weights: Named, gradient_at: Callable[[Named], Named], steps: int, rate: float) -> Named:
    """Return how far steps of gradient ascent go from the weights."""
    there = {name: weight.double() for name, weight in weights.items()}
    for _ in range(steps):
        gradients = gradient_at({name: value.to(weights[name].dtype) for name, value in there.items()})
        there = {name: value + rate * gradients[name].double() for name, value in there.items()}
    return {name: value - weights[name].double() for name, value in there.items()}


def refreshed(weights: Named, walked: Named, strength: float, damping: float, importance: Named | None) -> Named:
    """Return the weights after unlearning without noise."""
    result = {}
    for name, weight in weights.items():
        start, away = weight.double(), _length(walked[name])
        step = walked[name] * (_length(weight) / away) if away > 0 else torch.zeros_like(start)
        shrink = 1.0 if importance is None else 1 + damping * importance[name]
        result[name] = start + strength * step / shrink
    return result


def accumulated(old: Named | None, new: Named, decay: float) -> Named:
    """Return decay * old + new, for the importances of past tasks and of the one that ended."""
    return {name: value + (decay * old[name] if old is not None else 0.0) for name, value in new.items()}
