"""Slow twin of local-update training: several workers simulated in NumPy, in double precision, one after the other.

Nothing is shared with the package, torch or Lightning. A network with one hidden tanh layer has its gradients written
out by hand, the inner optimizers are written out, and a worker's weights are one flat vector. Every mean is taken the
moment it is launched: a delayed exchange only *uses* it a round later.
"""

from dataclasses import dataclass, field

import numpy as np

INPUTS, HIDDEN = 4, 5
SIZES = {"hidden.weight": (HIDDEN, INPUTS), "hidden.bias": (HIDDEN,), "head.weight": (1, HIDDEN), "head.bias": (1,)}
# The first parameter group is the hidden layer, the second one the head.
HIDDEN_ENTRIES = HIDDEN * INPUTS + HIDDEN
ENTRIES = HIDDEN_ENTRIES + HIDDEN + 1


@dataclass
class Inner:
    """What every worker does by itself."""

    name: str = "sgd"  # sgd, adamw
    rates: tuple = (0.1, 0.04)  # of the two groups
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None  # largest norm of the gradient
    accumulate: int = 1
    head_every: int = 1  # steps of the hidden layer for one of the head, which has a gradient of zero in between
    factors: list | None = None  # the schedule: multiplies the rates, one entry an optimizer step

    def rate(self, step):
        """The rate of each entry of the vector at an optimizer step."""
        factor = 1.0 if self.factors is None else self.factors[step]
        first, second = self.rates
        return factor * np.concatenate([np.full(HIDDEN_ENTRIES, first), np.full(ENTRIES - HIDDEN_ENTRIES, second)])


@dataclass
class Outer:
    """What the workers do together."""

    method: str  # co2, local_sgd, slowmo, diloco
    local_steps: object = 3  # a number, or (from step, steps) pairs
    delayed: bool = False
    variant: str = "paper"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    momentum_clip: float | None = None
    staleness_penalty: object = 1.0
    warmup_steps: int = 0
    processes_per_worker: int = 1  # these average their gradients at every step


@dataclass
class Record:
    """What a run did: the weights of every process after each step and after each checkpoint, and its last state."""

    after_step: list = field(default_factory=list)  # [step][process] -> vector, the exchange of that step done
    after_save: dict = field(default_factory=dict)  # step -> vector, the same on all
    boundaries: list = field(default_factory=list)  # steps after which a round ended
    momentum: np.ndarray | None = None
    final: np.ndarray | None = None


def initial_weights(seed=0):
    """Weights that every worker starts from."""
    return np.random.default_rng(seed).normal(scale=0.5, size=ENTRIES)


def random_data(processes, batches, samples=3, seed=1):
    """Batches of an epoch of each process, ``data[process][batch] = (inputs, targets)``; each process has its own."""
    data = []
    for process in range(processes):
        rng = np.random.default_rng([seed, process])
        x = [rng.normal(size=(samples, INPUTS)) for _ in range(batches)]
        # The workers disagree about the targets too, so that their weights drift apart.
        data.append([(b, np.sin(b.sum(1, keepdims=True)) + 0.5 * process) for b in x])
    return data


def unpack(vector):
    """Name the parts of a vector of weights."""
    parts, start = {}, 0
    for name, shape in SIZES.items():
        count = int(np.prod(shape))
        parts[name] = vector[start : start + count].reshape(shape)
        start += count
    return parts


def gradient(vector, inputs, targets):
    """Gradient of the mean squared error of ``head(tanh(hidden(x)))``."""
    w = unpack(vector)
    hidden = np.tanh(inputs @ w["hidden.weight"].T + w["hidden.bias"])
    error = hidden @ w["head.weight"].T + w["head.bias"] - targets
    back = 2.0 * error / error.size
    inside = (back @ w["head.weight"]) * (1.0 - hidden**2)
    parts = [(inside.T @ inputs).ravel(), inside.sum(0), (back.T @ hidden).ravel(), back.sum(0)]
    return np.concatenate(parts)


def clipped(grad, largest):
    """Scale a gradient down to a norm, with the small number that torch adds to the norm."""
    if largest is None:
        return grad
    return grad * min(1.0, largest / (np.sqrt((grad**2).sum()) + 1e-6))


class InnerOptimizer:
    """SGD with momentum, or AdamW, with the defaults of torch."""

    def __init__(self, inner):
        self.inner = inner
        self.slots = {}  # every floating state, by name
        self.count = 0

    def step(self, weights, grad, rate):
        """Return the weights after one step."""
        if self.inner.name == "adamw":
            return self._adamw(weights, grad, rate)
        grad = grad + self.inner.weight_decay * weights
        if self.inner.momentum:
            before = self.slots.get("velocity")
            self.slots["velocity"] = grad if before is None else self.inner.momentum * before + grad
            grad = self.slots["velocity"]
        return weights - rate * grad

    def _adamw(self, weights, grad, rate):
        first, second = 0.9, 0.999
        self.count += 1
        weights = weights - rate * self.inner.weight_decay * weights
        m = first * self.slots.get("m", 0.0) + (1 - first) * grad
        v = second * self.slots.get("v", 0.0) + (1 - second) * grad**2
        self.slots = {"m": m, "v": v}
        m_hat, v_hat = m / (1 - first**self.count), v / (1 - second**self.count)
        return weights - rate * m_hat / (np.sqrt(v_hat) + 1e-8)


class OuterOptimizer:
    """The outer step of the four methods on the anchor that all workers share."""

    def __init__(self, outer):
        self.outer = outer
        self.momentum = np.zeros(ENTRIES)
        self.moved = 0.0  # length of the last outer displacement
        self.longest = 0.0

    def step(self, anchor, mean_delta, learning_rate):
        """Return the anchor after one outer step."""
        o = self.outer
        if o.method == "local_sgd":
            return anchor - mean_delta
        if o.method == "slowmo":
            scaled = mean_delta / learning_rate if learning_rate != 0 else np.zeros_like(mean_delta)
            self.momentum = o.outer_momentum * self.momentum + scaled
            return anchor - o.outer_lr * learning_rate * self.momentum
        if o.method == "diloco":
            self.momentum = o.outer_momentum * self.momentum + mean_delta
            return anchor - o.outer_lr * (mean_delta + o.outer_momentum * self.momentum)
        return self._co2(anchor, mean_delta)

    def _co2(self, anchor, mean_delta):
        o = self.outer
        penalty = o.staleness_penalty
        if penalty == "gap":
            self.longest = max(self.longest, self.moved)
            penalty = 1.0 + (self.moved / self.longest if self.longest > 0 else 0.0)
        self.momentum = o.outer_momentum * self.momentum + mean_delta / penalty
        if o.momentum_clip is not None:
            self.momentum = np.clip(self.momentum, -o.momentum_clip, o.momentum_clip)
        step = o.outer_lr * self.momentum
        self.moved = np.sqrt((step**2).sum())
        return anchor - step


def length_of_round(local_steps, step):
    """Steps of a round that begins when ``step`` optimizer steps are done."""
    if isinstance(local_steps, int):
        return local_steps
    valid = [steps for from_step, steps in local_steps if from_step <= step]
    return valid[-1]


class Workers:
    """The workers of one run; ``x`` are their weights, ``s`` where their rounds began, ``a`` what all agree on."""

    def __init__(self, outer, inner, count, start):
        self.outer, self.inner, self.count = outer, inner, count
        self.rule = OuterOptimizer(outer)
        self.optimizers = [InnerOptimizer(inner) for _ in range(count)]
        self.a = start.copy()
        self.s = [start.copy() for _ in range(count)]
        self.x = [start.copy() for _ in range(count)]
        self.pending = None  # the mean of a round and the learning rate of its last step
        self.steps = 0  # optimizer steps done
        self.done = 0  # steps of the present round
        self.length = None
        self.touched = False  # since the last consolidation

    def train(self, grads):
        """One optimizer step of every worker; return whether a round ended with it."""
        warming = self.steps < self.outer.warmup_steps
        if warming:
            together = sum(grads) / self.count
            grads = [together] * self.count
        rate = self.inner.rate(self.steps)
        for i, optimizer in enumerate(self.optimizers):
            self.x[i] = optimizer.step(self.x[i], clipped(grads[i], self.inner.clip), rate)
        self.touched = True
        if not warming:
            return self._count(float(rate[0]))
        self.steps += 1
        if self.steps == self.outer.warmup_steps:
            self.a = sum(self.x) / self.count
            self.s = [self.a.copy() for _ in self.x]
        return False

    def consolidate(self):
        """Drain and average everything, as a checkpoint and the end of the fit do."""
        if not self.touched:
            return
        self._take_pending()
        self.a = self.a - self._mean([s - x for s, x in zip(self.s, self.x, strict=True)])
        self.s = [self.a.copy() for _ in self.x]
        self.x = [self.a.copy() for _ in self.x]
        for name in self.optimizers[0].slots:
            mean = self._mean([optimizer.slots[name] for optimizer in self.optimizers])
            for optimizer in self.optimizers:
                optimizer.slots[name] = mean.copy()
        self.done, self.length, self.touched = 0, None, False

    def _count(self, learning_rate):
        if self.length is None:
            self.length = length_of_round(self.outer.local_steps, self.steps)
        self.steps += 1
        self.done += 1
        if self.done < self.length:
            return False
        self._exchange(learning_rate)
        self.done, self.length = 0, None
        return True

    def _exchange(self, learning_rate):
        deltas = [s - x for s, x in zip(self.s, self.x, strict=True)]
        mean = self._mean(deltas)
        if not self.outer.delayed:
            self.a = self.rule.step(self.a, mean, learning_rate)
            self.s = [self.a.copy() for _ in deltas]
        else:
            self._take_pending()
            self.pending = (mean, learning_rate)
            keep = 1.0 if self.outer.variant == "corrected" else 0.0
            self.s = [self.a - keep * delta for delta in deltas]
        self.x = [s.copy() for s in self.s]

    def _take_pending(self):
        if self.pending is not None:
            mean, learning_rate = self.pending
            self.a = self.rule.step(self.a, mean, learning_rate)
            self.pending = None

    def _mean(self, values):
        return sum(values) / self.count


def micro_batches(batches, epochs, accumulate):
    """Return the lists of batch numbers that make the optimizer steps; an epoch's rest makes a step of its own."""
    steps = []
    for _ in range(epochs):
        for first in range(0, batches, accumulate):
            steps.append(list(range(first, min(first + accumulate, batches))))
    return steps


def simulate(outer, inner, data, *, steps, start=None, save_at=()):
    """Train on ``data[process][batch] = (inputs, targets)``, epoch after epoch, for a number of optimizer steps.

    Args:
        outer: What the workers do together.
        inner: What each does by itself.
        data: The batches of an epoch of each process.
        steps: Optimizer steps.
        start: The first weights.
        save_at: Optimizer steps after which a checkpoint is saved.
    """
    processes = len(data)
    share = outer.processes_per_worker
    workers = Workers(outer, inner, processes // share, initial_weights() if start is None else start)
    record = Record()
    plan = micro_batches(len(data[0]), steps, inner.accumulate)[:steps]
    for step, batches in enumerate(plan, start=1):
        # An incomplete last group is still divided by the number asked for, as the host does.
        each = [
            sum(gradient(workers.x[p // share], *data[p][b]) for b in batches) / inner.accumulate
            for p in range(processes)
        ]
        if step % inner.head_every:
            for grad in each:
                grad[HIDDEN_ENTRIES:] = 0.0
        grads = [sum(each[w * share : (w + 1) * share]) / share for w in range(workers.count)]
        if workers.train(grads):
            record.boundaries.append(step)
        record.after_step.append([workers.x[p // share].copy() for p in range(processes)])
        if step in save_at:
            workers.consolidate()
            record.after_save[step] = workers.a.copy()
    workers.consolidate()
    record.momentum, record.final = workers.rule.momentum, workers.a
    return record
