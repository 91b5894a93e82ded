r"""Softmax collapse: samples whose cross-entropy is exactly 0 in floating point, so that they teach next to nothing.

With logits :math:`z` of one sample over :math:`C` classes, softmax needs :math:`\sum_c \exp(z_c - \max z)`. Where the
largest logit is ahead of all others by more than about 16.6 in float32 (24 bits; 5.5 in bfloat16, 7.6 in float16)
plus :math:`\log (C - 1)`, the other terms are absorbed by the 1 of the largest: the sum is exactly 1, and the loss of
that class and the gradient of its logit are exactly 0 (arXiv 2501.04697, which names it). The gradients of the other
logits are their probabilities: tiny, and not always 0.
"""

import torch
from torch import Tensor

__all__ = ["softmax_collapse"]


@torch.no_grad()
def softmax_collapse(logits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tell which samples' softmax has collapsed onto one class.

    Args:
        logits: Scores of shape (..., C), in any floating-point precision.
        dtype: The floating-point precision in which the softmax is judged, usually that of the loss.

    Returns:
        Boolean tensor of shape (...): whether the sum of the exponentials is exactly 1 in ``dtype``.

    Raises:
        ValueError: If ``dtype`` is not a floating-point one, or there is only one class.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating-point dtype. Choose torch.float32, torch.bfloat16 …")
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} have no two classes in the last dimension. Give (..., C), C > 1."
        )
    # Autocast would widen the exponentials, and with them what is judged.
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.detach().to(dtype)
        shares = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        return shares.sum(dim=-1) == 1
