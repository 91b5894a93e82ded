"""Slow twins of what stays near the end of the last task: by weights (L2, EWC) or by predictions (LwF).

Everything is float64 and one sample, one tensor at a time.
"""

import torch
from oracles.trajectory_twin import per_sample
from torch import Tensor, nn

from lightning_stable.testing.harness import Net

Named = dict[str, Tensor]
Batch = tuple[Tensor, ...]


def fisher(weights: Named, buffers: Named, samples: Batch, weighted: bool = False) -> Named:
    """Return the mean over samples of the squared gradient of each sample's own loss, in eval mode.

    Args:
        weights: Where to take it.
        buffers: Those of batch norm.
        samples: All of them, as one batch.
        weighted: Whether each counts by the likelihood of its target, the exponential of minus its loss.
    """
    module = Net()
    module.load_state_dict({**weights, **buffers})
    module.eval()
    names, parameters = zip(*module.named_parameters(), strict=True)
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in weights.items()}
    for number in range(len(samples[0])):
        loss = module.loss(tuple(part[number : number + 1] for part in samples))
        share = float((-loss.detach()).exp()) if weighted else 1.0
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            total[name] += share * gradient.double() ** 2
    return {name: value / len(samples[0]) for name, value in total.items()}


class AnchorTwin:
    """Adds to each gradient that of lam * sum F (w - w*)^2, with w* where the last task ended.

    Args:
        lam: Weight of the penalty.
        decay: The share of the old F that stays when a task ends; ``None`` for an F of ones.
    """

    def __init__(self, lam: float, decay: float | None = None) -> None:
        self.lam = lam
        self.decay = decay
        self.anchor: Named = {}
        self.importance: Named = {}

    def end_task(self, weights: Named, importance: Named | None = None) -> None:
        """Remember where a task ended, and how much each weight meant to it."""
        for name, value in weights.items():
            self.anchor[name] = value.double()
            if self.decay is None:
                self.importance[name] = torch.ones(value.shape, dtype=torch.float64)
            else:
                before = self.importance.get(name, torch.zeros(value.shape, dtype=torch.float64))
                self.importance[name] = self.decay * before + importance[name]

    def penalty(self, weights: Named) -> float:
        """Return the penalty, its weight included."""
        total = 0.0
        for name, anchor in self.anchor.items():
            total += self.lam * float((self.importance[name] * (weights[name].double() - anchor) ** 2).sum())
        return total

    def gradient(self, gradients: Named, weights: Named) -> Named:
        """Return the gradients with the penalty's added."""
        result = {name: value.double() for name, value in gradients.items()}
        for name, anchor in self.anchor.items():
            result[name] = result[name] + 2 * self.lam * self.importance[name] * (weights[name].double() - anchor)
        return result


class LwFTwin:
    """Compares each sample's distribution with what the model said of it when the last task ended.

    Args:
        lam: Weight of the term.
        temperature: Of both distributions.
    """

    def __init__(self, lam: float, temperature: float) -> None:
        self.lam = lam
        self.temperature = temperature
        self.teacher: Named | None = None

    def end_task(self, weights: Named, buffers: Named) -> None:
        """Remember the parameters and the buffers that a task ended with."""
        self.teacher = {name: value.clone() for name, value in {**weights, **buffers}.items()}

    def term(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the weighted term of the batch whose logits the module, a ``WatchedNet``, gave last."""
        if self.teacher is None:
            return torch.zeros((), dtype=torch.float64)
        now, training = module.logits, module.training
        with torch.no_grad():
            torch.func.functional_call(module.eval(), self.teacher, (x,))
        past, module.logits = module.logits, now
        module.train(training)
        return self.lam * per_sample(past, now, self.temperature).mean()
