"""Slow twin of 1-bit Adam: several workers simulated in NumPy, in double precision, one after the other.

Nothing is shared with the package, torch or Lightning. A network with one hidden tanh layer has its gradients written
out by hand. All parameters are one flat vector; the pieces that share a scale are found entry by entry: two entries
belong together if they are of one tensor and fall into the chunk of one worker.
"""

from dataclasses import dataclass, field

import numpy as np

INPUTS, HIDDEN = 4, 5
SIZES = {"hidden.weight": (HIDDEN, INPUTS), "hidden.bias": (HIDDEN,), "head.weight": (1, HIDDEN), "head.bias": (1,)}
# The first parameter group is the hidden layer, the second one the head.
COUNTS = [int(np.prod(shape)) for shape in SIZES.values()]
ENTRIES = sum(COUNTS)
TENSOR = np.repeat(np.arange(len(COUNTS)), COUNTS)
HEAD = TENSOR >= 2
BATCHES = 40


@dataclass
class Settings:
    """What the run is like; pairs are of the two parameter groups."""

    decoupled: bool = False
    rates: tuple = (0.05, 0.02)
    beta1: tuple = (0.9, 0.8)
    beta2: tuple = (0.99, 0.95)
    eps: tuple = (1e-8, 1e-6)
    decay: tuple = (0.0, 0.0)
    freeze_step: int = 3
    steps: int = 12
    clip: float | None = None  # largest norm of a gradient
    accumulate: int = 1
    factors: list | None = None  # the schedule: multiplies the rates, one entry an optimizer step
    dead_input: bool = True  # the last input is always zero, so its weights never have a gradient


@dataclass
class Record:
    """What all workers hold after each step, and what each has not sent at the end."""

    weights: list = field(default_factory=list)
    momentum: list = field(default_factory=list)
    worker_errors: list = field(default_factory=list)  # [worker] -> vector
    server_errors: np.ndarray = field(default_factory=lambda: np.zeros(ENTRIES))


def initial_weights():
    return np.random.default_rng(3).normal(0, 0.5, ENTRIES)


def batch(index, worker, dead_input=True):
    """The samples of a batch that a worker takes: x of shape (3, INPUTS) and y of shape (3, 1)."""
    rng = np.random.default_rng([index % BATCHES, worker])
    x = rng.normal(size=(3, INPUTS))
    y = np.sin(2 * x.sum(1, keepdims=True)) + 0.3 * rng.normal(size=(3, 1))
    if dead_input:
        x[:, -1] = 0
    return x, y


def gradient(weights, x, y):
    """The gradient of the mean squared error, by hand."""
    w1, b1, w2, b2 = (
        part.reshape(shape)
        for part, shape in zip(np.split(weights, np.cumsum(COUNTS)[:-1]), SIZES.values(), strict=True)
    )
    hidden = np.tanh(x @ w1.T + b1)
    back = 2 * (hidden @ w2.T + b2 - y) / len(x)
    inner = (back @ w2) * (1 - hidden**2)
    return np.concatenate([(inner.T @ x).ravel(), inner.sum(0), (back.T @ hidden).ravel(), back.sum(0)])


def clipped(vector, limit):
    return vector if limit is None else vector * min(1.0, limit / (np.linalg.norm(vector) + 1e-6))


def chunk_of_each_entry(workers):
    """Which worker serves each entry: equal chunks of whole bytes of signs."""
    length = 8 * int(np.ceil(ENTRIES / (8 * workers)))
    return np.arange(ENTRIES) // length


def compressed(z, alive, chunks):
    """Each living entry becomes its sign times the root mean square of the living entries of its piece."""
    result = np.zeros(ENTRIES)
    for tensor in range(len(COUNTS)):
        for chunk in set(chunks):
            piece = alive & (tensor == TENSOR) & (chunk == chunks)
            if piece.any():
                scale = np.sqrt(np.mean(z[piece] ** 2))
                result[piece] = np.where(z[piece] >= 0, scale, -scale)
    return result


def simulate(settings, workers):
    """Train with so many workers; the weights and the momentum are the same on all of them."""

    def of_groups(pair):
        return np.where(HEAD, pair[1], pair[0])

    beta1, beta2, eps, decay = map(of_groups, (settings.beta1, settings.beta2, settings.eps, settings.decay))
    weights, m, v = initial_weights(), np.zeros(ENTRIES), np.zeros(ENTRIES)
    errors, server_error = [np.zeros(ENTRIES) for _ in range(workers)], np.zeros(ENTRIES)
    chunks, record = chunk_of_each_entry(workers), Record()
    for step in range(1, settings.steps + 1):
        rate = of_groups(settings.rates) * (1.0 if settings.factors is None else settings.factors[step - 1])
        first = (step - 1) * settings.accumulate
        local = [
            np.mean(
                [
                    gradient(weights, *batch(index, worker, settings.dead_input))
                    for index in range(first, first + settings.accumulate)
                ],
                axis=0,
            )
            for worker in range(workers)
        ]
        l2 = 0.0 if settings.decoupled else decay * weights
        if step <= settings.freeze_step:
            g = clipped(np.mean(local, axis=0), settings.clip) + l2
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            root = np.sqrt(v / (1 - beta2**step)) + eps
        else:
            alive = v != 0
            sent = []
            for worker, own in enumerate(local):
                z = beta1 * m + (1 - beta1) * (clipped(own, settings.clip) + l2) + errors[worker]
                sent.append(compressed(z, alive, chunks))
                errors[worker] = np.where(alive, z - sent[-1], 0)
            s = np.mean(sent, axis=0) + server_error
            m = compressed(s, alive, chunks)
            server_error = np.where(alive, s - m, 0)
        if settings.decoupled:
            weights = weights - rate * decay * weights
        weights = weights - rate * m / (1 - beta1**step) / root
        record.weights.append(weights)
        record.momentum.append(m)
    record.worker_errors, record.server_errors = errors, server_error
    return record
