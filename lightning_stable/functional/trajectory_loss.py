r"""Trajectory loss: how far a model's predictions have moved from earlier ones, the term of SAF and MESA.

With logits :math:`z` of this step, :math:`\tilde z` of the past (SAF: the same samples some epochs ago; MESA: an
average of the weights on the same batch) and a temperature :math:`\tau`, for each sample

.. math:: \tau^2\, \mathrm{KL}\bigl(\mathrm{softmax}(\tilde z/\tau) \,\|\, \mathrm{softmax}(z/\tau)\bigr)

in nats, averaged over positions where a sample has several. Its minimisation penalises fast changes of the loss, which
stands for the sharpness of the minimum at the cost of plain training (arXiv 2205.14083). The released code takes the
logarithm of a softmax, which underflows; here all is done with logarithms of probabilities.

:func:`top_k_groups` keeps the largest classes of a prediction apart and lumps the others into one class. The divergence
of grouped distributions is never larger than that of the full ones (ours, to make records of many classes small).
"""

import torch
from torch import Tensor

__all__ = ["group", "soften", "softened_divergence", "top_k_groups", "trajectory_loss"]


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of ``logits / temperature`` over the last dimension, in float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=-1)


def softened_divergence(past: Tensor, now: Tensor) -> Tensor:
    """Return the divergence KL(past || now) of each sample, in nats.

    Args:
        past: Log-probabilities of shape (N, ..., classes).
        now: Those of the present, of the same shape.

    Returns:
        Shape (N,): the mean over the dimensions between.
    """
    share = past.exp()
    # A class that is masked out has no logarithm to compare.
    divergence = (share * torch.where(share > 0, past - now, 0)).sum(-1)
    return divergence.flatten(1).mean(1) if divergence.ndim > 1 else divergence


def trajectory_loss(past_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return the trajectory loss of each sample, without its weight.

    Args:
        past_logits: Shape (N, ..., classes).
        logits: Those of the present, of the same shape.
        temperature: Divides the logits.

    Returns:
        Shape (N,), in nats times the square of the temperature.
    """
    return temperature**2 * softened_divergence(soften(past_logits, temperature), soften(logits, temperature))


def top_k_groups(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the ``k`` largest classes apart and lump the others.

    Args:
        log_probs: Shape (..., classes), with more classes than ``k``.
        k: Number of classes that stay.

    Returns:
        The log-probabilities of the ``k`` classes, largest first, and of all others together, of shape (..., k + 1);
        and the indices of the ``k`` classes, of shape (..., k).
    """
    indices = log_probs.topk(k, dim=-1).indices
    return group(log_probs, indices), indices


def group(log_probs: Tensor, indices: Tensor) -> Tensor:
    """Return the log-probabilities of the classes ``indices``, and of all others together."""
    # Where every other class is masked out, the logarithm of their sum has no derivative.
    log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    chosen = log_probs.gather(-1, indices)
    # What is left is added up, not taken from 1: a difference would lose a small rest to rounding.
    rest = log_probs.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], dim=-1)
