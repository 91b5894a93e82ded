"""Slow twin of Stable-SPAM on nested lists of Python floats, alone and with an Adam whose moments are reset.

Gradients are given as a list of flat lists, one a tensor.
"""

import math


def norm2(values):
    total = 0.0
    for value in values:
        total += value * value
    return math.sqrt(total)


class Average:
    """A running average from 0, read with the correction for its start."""

    def __init__(self, rate):
        self.rate = rate
        self.value = 0.0
        self.updates = 0

    def put(self, value, rate=None):
        rate = self.rate if rate is None else rate
        self.value = rate * self.value + (1 - rate) * value
        self.updates += 1
        return self.value / (1 - rate**self.updates)


class StableSPAMTwin:
    """AdaClip and AdaGN of Stable-SPAM, one tensor and one element at a time.

    Args:
        count: How many tensors there are.
        clip: Whether entries beyond the running maximum are scaled down.
        norm: "unit" for a normalised gradient, "history" for one of its usual norm, None for neither.
    """

    def __init__(self, count, gamma1=0.7, gamma2=0.9, gamma3=0.999, clip=True, norm="unit", eps=1e-8):
        self.maxima = [Average(gamma3) for _ in range(count)]
        self.norms = [Average(gamma1) for _ in range(count)]
        self.squares = [Average(gamma2) for _ in range(count)]
        self.clip = clip
        self.norm = norm
        self.eps = eps

    def transform(self, gradients, gamma1=None):
        """Return the gradients that the optimizer should see."""
        return [self._one(index, list(gradient), gamma1) for index, gradient in enumerate(gradients)]

    def _one(self, index, gradient, gamma1):
        if not all(math.isfinite(value) for value in gradient) or not any(gradient):
            return gradient
        if self.clip:
            largest = max(abs(value) for value in gradient)
            limit = self.maxima[index].put(largest)
            gradient = [value / largest * limit if abs(value) > limit else value for value in gradient]
        if self.norm is None:
            return gradient
        now = norm2(gradient)
        mean = self.norms[index].put(now, gamma1)
        root = math.sqrt(self.squares[index].put(now * now))
        wanted = mean / (root + self.eps) if self.norm == "unit" else mean
        return [value / now * wanted for value in gradient]


class Adam:
    """Adam on lists of lists, without weight decay."""

    def __init__(self, weights, lr, betas=(0.9, 0.999), eps=1e-8):
        self.weights = [list(tensor) for tensor in weights]
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.reset()

    def reset(self):
        """Forget the moments, and that there were steps."""
        self.first = [[0.0] * len(tensor) for tensor in self.weights]
        self.second = [[0.0] * len(tensor) for tensor in self.weights]
        self.count = 0

    def step(self, gradients):
        self.count += 1
        beta1, beta2 = self.betas
        for i, gradient in enumerate(gradients):
            for j, g in enumerate(gradient):
                self.first[i][j] = beta1 * self.first[i][j] + (1 - beta1) * g
                self.second[i][j] = beta2 * self.second[i][j] + (1 - beta2) * g * g
                mean = self.first[i][j] / (1 - beta1**self.count)
                square = self.second[i][j] / (1 - beta2**self.count)
                self.weights[i][j] -= self.lr * mean / (math.sqrt(square) + self.eps)


class Momentum:
    """Gradient descent with momentum on lists of lists, with a rate for each tensor."""

    def __init__(self, weights, rates, momentum=0.9):
        self.weights = [list(tensor) for tensor in weights]
        self.rates = rates
        self.momentum = momentum
        self.reset()

    def reset(self):
        """Forget the velocity."""
        self.velocity = [[0.0] * len(tensor) for tensor in self.weights]

    def step(self, gradients):
        for i, gradient in enumerate(gradients):
            for j, g in enumerate(gradient):
                self.velocity[i][j] = self.momentum * self.velocity[i][j] + g
                self.weights[i][j] -= self.rates[i] * self.velocity[i][j]


def resets_before(update, every):
    """Tell whether the moments are forgotten before an update, counted from 1: before k * every + 1, k at least 1."""
    return every is not None and update > 1 and (update - 1) % every == 0


def shrunk(number, total, final):
    """Return what the first decays are multiplied by at an update, counted from 0: half a turn of a cosine."""
    if total is None:
        return 1.0
    done = min(number / total, 1)
    return final + (1 - final) * math.cos(math.pi * done / 2) ** 2
