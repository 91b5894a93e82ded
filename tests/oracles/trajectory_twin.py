"""Slow twins of the losses along the training trajectory, SAF and MESA: explicit sums of probabilities in float64."""

import torch
from torch import Tensor, nn


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return exp(z / T) over its sum; only for logits whose exponentials exist in float64."""
    powers = (logits.double() / temperature).exp()
    return powers / powers.sum(-1, keepdim=True)


def divergence(past: Tensor, now: Tensor) -> Tensor:
    """Return the sum over classes of p (log p - log q) for probabilities p and q."""
    total = torch.zeros(past.shape[:-1], dtype=torch.float64)
    for label in range(past.shape[-1]):
        p, q = past[..., label], now[..., label]
        total = total + p * (p.log() - q.log())
    return total


def per_sample(past: Tensor, now: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(past || now) of logits (N, ..., C) for each sample, the mean over the dims between."""
    found = divergence(probabilities(past, temperature), probabilities(now, temperature))
    return temperature**2 * found.reshape(len(found), -1).mean(1)


def lumped(values: Tensor, indices: Tensor) -> Tensor:
    """Return the probabilities of the classes ``indices``, then the sum of all others, sample by sample."""
    rows = []
    for row, chosen in zip(values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1]), strict=True):
        rest = [row[label] for label in range(len(row)) if label not in chosen.tolist()]
        rows.append(torch.stack([*(row[label] for label in chosen.tolist()), torch.stack(rest).sum()]))
    return torch.stack(rows).reshape(*values.shape[:-1], -1)


class SAFTwin:
    """Compares each sample with its own distribution some epochs before.

    Args:
        lam: Weight of the term.
        temperature: Of both distributions.
        start_epoch: The first epoch with a term.
        lag_epochs: How many epochs lie between the two distributions.
        top_k: How many classes are recorded on their own, all others as one.
    """

    def __init__(
        self,
        lam: float,
        temperature: float,
        start_epoch: int,
        lag_epochs: int,
        top_k: int | None = None,
    ) -> None:
        self.lam = lam
        self.temperature = temperature
        self.start_epoch = start_epoch
        self.lag_epochs = lag_epochs
        self.top_k = top_k
        self.table: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def term(self, logits: Tensor, samples: list[int], epoch: int) -> Tensor:
        """Return the weighted term of a batch, a sample without a record counting as 0."""
        now = probabilities(logits, self.temperature)
        total = torch.zeros((), dtype=torch.float64)
        for row, sample in zip(now, samples, strict=True):
            record = self.table.get((sample, epoch - self.lag_epochs))
            if epoch >= self.start_epoch and record is not None:
                past, labels = record
                total = total + divergence(past, row if labels is None else lumped(row[None], labels[None])[0])
        return self.lam * self.temperature**2 * total / len(samples)

    def record(self, logits: Tensor, samples: list[int], epoch: int) -> None:
        """Put down what the samples' distributions are in this epoch."""
        for row, sample in zip(probabilities(logits.detach(), self.temperature), samples, strict=True):
            labels = None if self.top_k is None else row.argsort(descending=True)[: self.top_k]
            kept = row if labels is None else lumped(row[None], labels[None])[0]
            self.table[sample, epoch] = (kept, labels)


class MESATwin:
    """Compares each sample with what a moving average of the weights says of it now.

    Args:
        weights: Where training starts; the average starts there, too.
        lam: Weight of the term.
        temperature: Of both distributions.
        start_epoch: The first epoch with a term.
        decay: Of the average, which takes in the weights after every optimizer step.
    """

    def __init__(
        self, weights: dict[str, Tensor], lam: float, temperature: float, start_epoch: int, decay: float
    ) -> None:
        self.shadow = {name: value.double() for name, value in weights.items()}
        self.lam = lam
        self.temperature = temperature
        self.start_epoch = start_epoch
        self.decay = decay

    def update(self, weights: dict[str, Tensor]) -> None:
        """Take in the weights after an optimizer step."""
        for name, value in weights.items():
            self.shadow[name] = self.decay * self.shadow[name] + (1 - self.decay) * value.double()

    def reference(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the head says under the average, in eval mode, with the buffers as the batch found them.

        The module is a ``WatchedNet``, left as it was found.
        """
        logits, training = module.logits, module.training
        averaged = {name: self.shadow[name].to(value.dtype) for name, value in module.named_parameters()}
        with torch.no_grad():
            torch.func.functional_call(module.eval(), {**module.buffers_before, **averaged}, (x,))
        reference, module.logits = module.logits, logits
        module.train(training)
        return reference

    def term(self, module: nn.Module, x: Tensor, epoch: int) -> Tensor:
        """Return the weighted term of the batch whose logits the module gave last."""
        if epoch < self.start_epoch:
            return torch.zeros((), dtype=torch.float64)
        now = module.logits
        return self.lam * per_sample(self.reference(module, x), now, self.temperature).mean()
