r"""1-bit Adam: Adam that, once its variance is frozen, exchanges one bit for each entry of its momentum.

The first steps are plain Adam on the mean gradient. Then the variance :math:`v` is frozen, and worker :math:`i` of
:math:`N` makes, from the momentum :math:`m` that all share and its own gradient :math:`g_i`,

.. math::

    z_i &= \beta_1 m + (1-\beta_1) g_i + e_i,   & e_i &\leftarrow z_i - C(z_i) \\
    s   &= \tfrac1N \textstyle\sum_i C(z_i) + e, & e   &\leftarrow s - C(s), \qquad m \leftarrow C(s) \\
    w   &\leftarrow w - \gamma\, \frac{m}{1-\beta_1^t}
            \Bigl(\sqrt{v/(1-\beta_2^T)} + \varepsilon\Bigr)^{-1}, & C(z) &= \frac{\lVert z\rVert_2}{\sqrt n}\,
            \mathrm{sign}(z) \text{ for each piece}

Every worker is the server of one chunk of :math:`s`: it gets that chunk of all :math:`C(z_i)`, keeps its error
:math:`e`, and sends :math:`C(s)` to all. :math:`e_i, e, m, v, g_i` have the units of a gradient (:math:`v`: squared);
:math:`t` counts the steps, :math:`T` those in which the variance was learned, :math:`\gamma` is the learning rate.

Source: arXiv 2102.02888. What differs from its released code (DeepSpeed), and why:

- The scale is one for each *piece*, a tensor or what of it lies in one chunk, of :math:`n` entries. There it is one for
  what is sent at a time; layers whose gradients differ in size need their own.
- Bias is corrected, as torch's Adam does it; the released code accepts the option and ignores it. The variance keeps
  the correction that it had when it was frozen, so the step size does not jump.
- Entries whose variance is 0 send nothing and keep a momentum of 0: any noise there would be divided by
  :math:`\varepsilon`. The released code leaves this to masks that the user makes.
- Weight decay is the optimizer's own: added to the gradient (Adam) or decoupled (AdamW). The released code has the
  decoupled one, after the adaptive step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional.compression import pack_signs, unpack_signs

__all__ = [
    "Layout",
    "OneBitAdamState",
    "SignMessage",
    "adam_step",
    "add_momenta",
    "init_one_bit_adam",
    "lay_out",
    "read_messages",
    "server_message",
    "worker_messages",
]


class Layout(NamedTuple):
    """How tensors laid end to end are cut into a chunk for each worker.

    Attributes:
        sizes: Entries of each tensor.
        chunk: Entries of each chunk, a multiple of 8, so that its signs are whole bytes.
        pieces: For each chunk the entries of its pieces: tensors, parts of them, and what fills the last chunks.
    """

    sizes: tuple[int, ...]
    chunk: int
    pieces: tuple[tuple[int, ...], ...]


class OneBitAdamState(NamedTuple):
    """What one worker keeps.

    Attributes:
        worker_error: What this worker has not sent yet, laid end to end: (workers * chunk,).
        server_error: What it has not sent yet of its own chunk of the mean: (chunk,).
        dead: True for entries that are never sent: no variance, or behind the last tensor. (workers * chunk,), bool.
        lengths: For each chunk the entries of its pieces: (pieces,), int64.
        counts: For each chunk the living entries of each piece, at least 1: (pieces,), in the errors' precision.
    """

    worker_error: Tensor
    server_error: Tensor
    dead: Tensor
    lengths: list[Tensor]
    counts: list[Tensor]


class SignMessage(NamedTuple):
    """A chunk as it travels.

    Attributes:
        signs: Eight signs a byte, a set bit for 0 and above: (chunk / 8,), uint8.
        scales: One for each piece of the chunk: (pieces,).
    """

    signs: Tensor
    scales: Tensor


def lay_out(sizes: Sequence[int], workers: int) -> Layout:
    """Cut tensors of these sizes into equal chunks, one for each worker."""
    total = sum(sizes)
    chunk = -(-total // (8 * workers)) * 8
    pieces: list[list[int]] = [[] for _ in range(workers)]
    position = 0
    for size in (*sizes, workers * chunk - total):
        end = position + size
        while position < end:
            piece = min(end, (position // chunk + 1) * chunk) - position
            pieces[position // chunk].append(piece)
            position += piece
    return Layout(tuple(sizes), chunk, tuple(tuple(of_chunk) for of_chunk in pieces))


@torch.no_grad()
def init_one_bit_adam(layout: Layout, variances: Sequence[Tensor], dtype: torch.dtype) -> OneBitAdamState:
    """Start with no errors, at the frozen variances.

    Args:
        layout: Of tensors with the sizes of ``variances``.
        variances: Adam's second moments, on one device, of any shapes.
        dtype: Precision of the errors and of the scales.
    """
    dead = [(variance == 0).flatten() for variance in variances]
    filled = len(layout.pieces) * layout.chunk - sum(layout.sizes)
    dead.append(torch.ones(filled, dtype=torch.bool, device=variances[0].device))
    flat = torch.cat(dead)
    error = torch.zeros(flat.shape, dtype=dtype, device=flat.device)
    lengths = [torch.tensor(pieces, device=flat.device) for pieces in layout.pieces]
    counts = [
        torch.stack([(~piece).sum() for piece in torch.split(chunk, list(pieces))]).clamp(min=1).to(dtype)
        for chunk, pieces in zip(torch.split(flat, layout.chunk), layout.pieces, strict=True)
    ]
    return OneBitAdamState(error, error.new_zeros(layout.chunk), flat, lengths, counts)


@torch.no_grad()
def add_momenta(
    views: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    *,
    beta1: float,
    l2: float = 0.0,
) -> None:
    r"""Add :math:`\beta_1 m + (1-\beta_1) g_i` to the worker's error, in place: it then holds :math:`z_i`.

    Args:
        views: The parts of ``worker_error`` that belong to these tensors, in their shapes.
        momenta: The shared momentum.
        gradients: This worker's; ``None`` counts as zero.
        weights: The weights.
        beta1: Decay rate of the momentum.
        l2: Weight decay that is added to the gradient.
    """
    if not views:
        return
    torch._foreach_add_(list(views), list(momenta), alpha=beta1)
    given = [(view, gradient) for view, gradient in zip(views, gradients, strict=True) if gradient is not None]
    if given:
        torch._foreach_add_([view for view, _ in given], [gradient for _, gradient in given], alpha=1 - beta1)
    if l2:
        torch._foreach_add_(list(views), list(weights), alpha=(1 - beta1) * l2)


@torch.no_grad()
def worker_messages(layout: Layout, state: OneBitAdamState) -> list[SignMessage]:
    """Return what goes to the server of each chunk; ``worker_error``, which held :math:`z_i`, keeps the rest."""
    errors, dead = torch.split(state.worker_error, layout.chunk), torch.split(state.dead, layout.chunk)
    parts = zip(errors, dead, state.lengths, state.counts, layout.pieces, strict=True)
    return [_compress(*chunk) for chunk in parts]


@torch.no_grad()
def server_message(layout: Layout, state: OneBitAdamState, rank: int, received: Sequence[SignMessage]) -> SignMessage:
    """Return what goes to every worker for the chunk of this rank; ``server_error`` is updated in place.

    Args:
        layout: The layout.
        state: This worker's state.
        rank: Whose chunk it is.
        received: Each worker's message for this chunk, in the order of the ranks.
    """
    lengths, error = state.lengths[rank], state.server_error
    for message in received:
        error.add_(_decompress(message, lengths, layout.chunk), alpha=1 / len(received))
    dead = torch.split(state.dead, layout.chunk)[rank]
    return _compress(error, dead, lengths, state.counts[rank], layout.pieces[rank])


@torch.no_grad()
def read_messages(layout: Layout, state: OneBitAdamState, messages: Sequence[SignMessage]) -> Tensor:
    """Return the new momentum, laid end to end, from the servers' messages in the order of their chunks."""
    chunks = zip(messages, state.lengths, strict=True)
    momentum = torch.cat([_decompress(message, lengths, layout.chunk) for message, lengths in chunks])
    return momentum.masked_fill_(state.dead, 0)


@torch.no_grad()
def adam_step(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    steps: Sequence[int],
    learned: Sequence[int],
    decay: float = 0.0,
) -> None:
    """Move the weights by Adam's step with a frozen variance, in place.

    Args:
        weights: The weights.
        momenta: The new momentum.
        variances: The frozen variance.
        lr: Learning rate.
        beta1: Decay rate of the momentum.
        beta2: Decay rate that the variance had.
        eps: Added to the root of the variance.
        steps: For each tensor the steps with this one, :math:`t`.
        learned: For each tensor the steps in which its variance was learned, :math:`T`.
        decay: Decoupled weight decay.
    """
    if not weights:
        return
    moved = list(weights)
    if decay:
        torch._foreach_mul_(moved, 1 - lr * decay)
    roots = torch._foreach_sqrt(list(variances))
    torch._foreach_div_(roots, [(1 - beta2**count) ** 0.5 for count in learned])
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(moved, list(momenta), roots, [-lr / (1 - beta1**step) for step in steps])


def _compress(values: Tensor, dead: Tensor, lengths: Tensor, counts: Tensor, pieces: tuple[int, ...]) -> SignMessage:
    """Return signs and scales of a chunk, and leave in it what they do not say."""
    values.masked_fill_(dead, 0)
    norms = torch.stack(torch._foreach_norm(torch.split(values, list(pieces))))
    message = SignMessage(pack_signs(values), norms / counts.sqrt())
    values.sub_(_decompress(message, lengths, values.numel())).masked_fill_(dead, 0)
    return message


def _decompress(message: SignMessage, lengths: Tensor, entries: int) -> Tensor:
    # The number of entries is given so that a GPU is not asked for it.
    scales = message.scales.repeat_interleave(lengths, output_size=entries)
    return torch.where(unpack_signs(message.signs, entries), scales, -scales)
