"""Lists of tensors as one vector."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["global_norm"]


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all tensors, without waiting for it.

    Args:
        tensors: At least one, of any shapes and floating-point precisions.

    Returns:
        A scalar on the first one's device, in float32, or in float64 if one of them is.
    """
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch._foreach_norm(list(tensors), 2, dtype=wide)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm
