"""Slow twins of the two weight averages, on nested lists of Python floats: one element at a time, no broadcasting.

Tensors are given as flat lists of floats, a model as a list of such lists.
"""

import math


def ema_decay(decay, updates, warmup):
    """Decay of the update that follows ``updates`` earlier ones; the power warm-up starts at 0 and rises to ``decay``.

    The warm-up is timm's ``1 - (1 + t / gamma) ** -power`` with gamma 1 and power 2/3.
    """
    if warmup is None:
        return decay
    ramp = 1 - 1 / math.pow(updates + 1, 2 / 3)
    return ramp if ramp < decay else decay


def ema(history, decay, warmup=None):
    """Average of a history of models: the first one starts the shadow, each further one is an update."""
    shadow = [list(tensor) for tensor in history[0]]
    for updates, model in enumerate(history[1:]):
        d = ema_decay(decay, updates, warmup)
        for i, tensor in enumerate(model):
            for j, value in enumerate(tensor):
                shadow[i][j] = d * shadow[i][j] + (1 - d) * value
    return shadow


def norm1(values):
    """Sum of absolute values."""
    total = 0.0
    for value in values:
        total += abs(value)
    return total


def difference(left, right):
    """Elementwise ``left - right``."""
    return [a - b for a, b in zip(left, right, strict=True)]


def balance(shadow, weights, previous_weights, gradient, previous_gradient, form, fallback):
    """Weight of the old shadow for one tensor.

    ``derived``: (1 + |g|) |w - w_prev| / (|w - shadow| |g - g_prev|);
    ``released``: 1 - 2 (1 + |g|) / (|w - shadow| |g - g_prev|), all norms L1. The fallback stands in for a gradient
    that is missing now or before, for a zero denominator, and for every value that is not inside (0, 1).
    """
    if gradient is None or previous_gradient is None:
        return fallback
    bottom = norm1(difference(weights, shadow)) * norm1(difference(gradient, previous_gradient))
    if bottom == 0:
        return fallback
    if form == "derived":
        beta = (1 + norm1(gradient)) * norm1(difference(weights, previous_weights)) / bottom
    elif form == "released":
        beta = 1 - 2 * (1 + norm1(gradient)) / bottom
    else:
        raise ValueError(form)
    if math.isnan(beta) or not 0 < beta < 1:
        return fallback
    return beta


class BalancedAverage:
    """The balanced average of a model, kept as lists of floats."""

    def __init__(self, weights, form="derived", fallback=0.99):
        self.shadow = [list(tensor) for tensor in weights]
        self.gradients = [None] * len(weights)
        self.form = form
        self.fallback = fallback

    def update(self, weights, previous_weights, gradients):
        """Take one step and return the coefficient of each tensor."""
        coefficients = []
        for i, new in enumerate(weights):
            beta = balance(
                self.shadow[i],
                new,
                previous_weights[i],
                gradients[i],
                self.gradients[i],
                self.form,
                self.fallback,
            )
            self.shadow[i] = [beta * s + (1 - beta) * w for s, w in zip(self.shadow[i], new, strict=True)]
            self.gradients[i] = None if gradients[i] is None else list(gradients[i])
            coefficients.append(beta)
        return coefficients
