"""Training with compressed gradients, worker by worker in NumPy and float64, written from the equations.

A perceptron with tanh between its layers, mean squared error, SGD with momentum. Nothing here knows buckets, messages,
flat tensors or hooks: each tensor of each worker is treated on its own.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["OPTIONAL", "SIZES", "Setting", "initial_weights", "random_batches", "simulate"]

Array = NDArray[np.float64]
Weights = dict[str, Array]

# Two matrices of one shape, one of another, and one that a low rank saves nothing of.
SIZES = (6, 16, 16, 16, 2)
# A layer that a network can do without.
OPTIONAL = 2


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        compressor: "none", "topk", "sign", "bf16" or "powersgd".
        error: "ef", "ef21", "econtrol", or "" for a compressor without memory.
        passes: The backward passes of a step: which layers each uses and which of them it updates.
        broken: Steps in which a worker's gradient is not finite: nothing is learnt and remembered in them.
        without: Steps that leave out :data:`OPTIONAL`: its weights stay as they are.
        buckets: For "powersgd": the tensors of each bucket in order, which decides where random numbers go.
    """

    compressor: str
    error: str = ""
    ratio: float = 0.1
    eta: float = 0.3
    rank: int = 2
    warmup: int = 0
    accumulate: int = 1
    clip: float | None = None
    rate: float = 0.05
    momentum: float = 0.9
    passes: Sequence[tuple[Sequence[int], Sequence[int]]] = ((tuple(range(4)), tuple(range(4))),)
    broken: frozenset[int] = frozenset()
    without: frozenset[int] = frozenset()
    buckets: Sequence[Sequence[str]] = field(default_factory=list)


def initial_weights() -> Weights:
    """Return the weights that training begins with, by the names that torch would give them."""
    random = np.random.default_rng(0)
    weights: Weights = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(SIZES)):
        weights[f"layers.{layer}.weight"] = random.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        weights[f"layers.{layer}.bias"] = random.normal(size=outputs) * 0.1
    return weights


def random_batches(workers: int, batches: int, samples: int = 4) -> list[list[tuple[Array, Array]]]:
    """Return the batches of each worker; the workers' data differ in kind."""
    random = np.random.default_rng(1)
    found = []
    for worker in range(workers):
        inputs = random.normal(loc=0.3 * worker, size=(batches, samples, SIZES[0]))
        outputs = random.normal(size=(batches, samples, SIZES[-1]))
        found.append(list(zip(inputs, outputs, strict=True)))
    return found


def simulate(setting: Setting, data: Sequence[Sequence[tuple[Array, Array]]], steps: int) -> list[Weights]:
    """Return the weights after each step; the batches of a worker come round and round."""
    weights = initial_weights()
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    exchanges = [Exchange(setting, len(data), seed) for seed in range(len(setting.passes))]
    history = []
    for step in range(steps):
        for number, (used, updated) in enumerate(setting.passes):
            layers = [n for n in range(len(SIZES) - 1) if n != OPTIONAL or step not in setting.without]
            names = [name for name in weights if int(name.split(".")[1]) in set(used) & set(layers)]
            gradients = [
                _mean([_gradient(weights, layers, *worker[i % len(worker)]) for i in _micro(step, setting.accumulate)])
                for worker in data
            ]
            if step in setting.broken:
                found = {name: np.zeros_like(weights[name]) for name in names}
            else:
                found = exchanges[number].exchange([{name: g[name] for name in names} for g in gradients])
            if setting.clip is not None:
                norm = np.sqrt(sum((g**2).sum() for g in found.values()))
                found = {name: g * min(1.0, setting.clip / (norm + 1e-6)) for name, g in found.items()}
            for name in names:
                if int(name.split(".")[1]) in updated:
                    velocity[name] = setting.momentum * velocity[name] + found[name]
                    weights[name] = weights[name] - setting.rate * velocity[name]
        history.append({name: value.copy() for name, value in weights.items()})
    return history


class Exchange:
    """What the workers remember between the exchanges of one kind of pass."""

    def __init__(self, setting: Setting, workers: int, seed: int) -> None:
        self.setting = setting
        self.workers = workers
        self.seed = seed
        self.count = 0
        self.error: list[Weights] = [{} for _ in range(workers)]
        self.estimate: list[Weights] = [{} for _ in range(workers)]
        self.factor: Weights = {}

    def exchange(self, gradients: Sequence[Weights]) -> Weights:
        """Return the gradient that all workers step with."""
        self.count += 1
        setting = self.setting
        if self.count <= setting.warmup or setting.compressor == "none":
            if setting.error in ("ef21", "econtrol") and self.count == setting.warmup:
                self.estimate = [{name: g.copy() for name, g in gradient.items()} for gradient in gradients]
            return _mean(gradients)
        if setting.compressor == "powersgd" and not self.factor:
            self._draw_factors(gradients[0])
        return {name: self._tensor(name, [gradient[name] for gradient in gradients]) for name in gradients[0]}

    def _tensor(self, name: str, gradients: list[Array]) -> Array:
        setting = self.setting
        if setting.compressor == "bf16":
            return _bf16(sum(_bf16(gradient / self.workers) for gradient in gradients))
        errors = [kept.get(name, np.zeros_like(gradients[0])) for kept in self.error]
        if setting.compressor == "powersgd":
            inputs = [gradient + error for gradient, error in zip(gradients, errors, strict=True)]
            result = self._low_rank(name, inputs)
            for worker, value in enumerate(inputs):
                self.error[worker][name] = value - result
            return result
        estimates = [kept.get(name, np.zeros_like(gradients[0])) for kept in self.estimate]
        messages = []
        for worker in range(self.workers):
            g, e, h = gradients[worker], errors[worker], estimates[worker]
            if setting.error == "ef":
                c = self._compress(g + e)
                self.error[worker][name] = g + e - c
            elif setting.error == "ef21":
                c = self._compress(g - h)
                self.estimate[worker][name] = h + c
            else:
                c = self._compress(setting.eta * e + g - h)
                self.error[worker][name] = e + g - h - c
                self.estimate[worker][name] = h + c
            messages.append(c)
        if setting.error == "ef":
            return sum(messages) / self.workers
        return sum(kept[name] for kept in self.estimate) / self.workers

    def _compress(self, value: Array) -> Array:
        flat = value.ravel()
        if self.setting.compressor == "sign":
            return np.where(flat >= 0, 1.0, -1.0).reshape(value.shape) * np.abs(flat).sum() / flat.size
        kept = np.argsort(-np.abs(flat), kind="stable")[: max(1, -int(-round(self.setting.ratio * flat.size, 6) // 1))]
        result = np.zeros_like(flat)
        result[kept] = flat[kept]
        return result.reshape(value.shape)

    def _is_compressed(self, value: Array) -> bool:
        rows = value.shape[0]
        columns = value.size // rows
        return 2 * min(rows, columns, self.setting.rank) * (rows + columns) < value.size

    def _draw_factors(self, like: Mapping[str, Array]) -> None:
        draws = np.random.RandomState(self.seed)
        for bucket in self.setting.buckets:
            generator = torch.Generator().manual_seed(int(draws.randint(1_000_000_000)))
            names = [name for name in bucket if self._is_compressed(like[name])]
            shapes = list(dict.fromkeys(like[name].shape for name in names))
            for name in sorted(names, key=lambda name: shapes.index(like[name].shape)):
                size = (like[name].shape[1], self.setting.rank)
                self.factor[name] = torch.randn(1, *size, generator=generator, dtype=torch.float64)[0].numpy()

    def _low_rank(self, name: str, inputs: list[Array]) -> Array:
        mean = sum(inputs) / self.workers
        if not self._is_compressed(mean):
            return mean
        left = np.linalg.qr(mean @ np.linalg.qr(self.factor[name])[0])[0]
        self.factor[name] = mean.T @ left
        return left @ self.factor[name].T


def _micro(step: int, accumulate: int) -> range:
    return range(step * accumulate, (step + 1) * accumulate)


def _mean(trees: Sequence[Weights]) -> Weights:
    return {name: sum(tree[name] for tree in trees) / len(trees) for name in trees[0]}


def _gradient(weights: Weights, layers: Sequence[int], inputs: Array, outputs: Array) -> Weights:
    values = [inputs]
    for layer in layers:
        z = values[-1] @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
        values.append(z if layer == layers[-1] else np.tanh(z))
    slope = 2 * (values[-1] - outputs) / outputs.size
    found: Weights = {}
    for layer, value in zip(reversed(layers), reversed(values[:-1]), strict=True):
        found[f"layers.{layer}.weight"] = slope.T @ value
        found[f"layers.{layer}.bias"] = slope.sum(0)
        slope = (slope @ weights[f"layers.{layer}.weight"]) * (1 - value**2)
    return found


def _bf16(value: Any) -> Array:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
