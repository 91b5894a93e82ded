"""The two compressors as messages: what a bucket becomes on the wire, and what the others make of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stable.functional.compression import pack_signs, sign_scale, top_k, top_k_count, unpack_signs

__all__ = ["Codec", "ScaledSign", "TopK", "join", "split"]

# Parts of a message begin at multiples of it, so that every dtype can be read in place.
_ALIGNMENT = 8


class Codec(ABC):
    """Turns the tensors of a bucket into parts of a message and back. Each tensor is compressed on its own."""

    @abstractmethod
    def encode(self, flat: Tensor, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        """Return the parts of a message.

        Args:
            flat: What to send of all tensors of a bucket, one after the other.
            sizes: Their numbers of entries.
            dtype: Precision of the values that are sent.
        """

    @abstractmethod
    def add(self, total: Tensor, parts: Sequence[Tensor], entries: Tensor) -> None:
        """Add to ``total``, in place, what a message's parts stand for.

        Args:
            total: A flat tensor for all tensors of the bucket.
            parts: What ``encode`` returned.
            entries: The tensors' numbers of entries, on the device of ``total``.
        """


class TopK(Codec):
    """Values and places of the largest entries of each tensor.

    Args:
        ratio: Share of the entries that are sent.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def encode(self, flat: Tensor, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        values, places, begin = [], [], 0
        for size, tensor in zip(sizes, torch.split(flat, sizes), strict=True):
            value, place = top_k(tensor, top_k_count(size, self.ratio))
            values.append(value.to(dtype))
            places.append(place + begin)
            begin += size
        return [torch.cat(values), torch.cat(places)]

    def add(self, total: Tensor, parts: Sequence[Tensor], entries: Tensor) -> None:
        values, places = parts
        # No place occurs twice, so the sum does not depend on an order.
        total.index_add_(0, places, values.to(total.dtype))


class ScaledSign(Codec):
    """A bit for each entry, and for each tensor the size that a bit stands for."""

    def encode(self, flat: Tensor, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        scales = torch.stack([sign_scale(tensor) for tensor in torch.split(flat, sizes)])
        return [scales, pack_signs(flat)]

    def add(self, total: Tensor, parts: Sequence[Tensor], entries: Tensor) -> None:
        scales, packed = parts
        scale = torch.repeat_interleave(scales, entries, output_size=total.numel())
        total.add_(torch.where(unpack_signs(packed, total.numel()), scale, -scale))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Return flat tensors of any dtypes as one message of bytes."""
    return torch.cat([torch.nn.functional.pad(raw, (0, -raw.numel() % _ALIGNMENT)) for raw in map(_bytes, parts)])


def split(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a message, which have the lengths and dtypes of ``like``."""
    parts, begin = [], 0
    for part in like:
        parts.append(message[begin : begin + part.nbytes].view(part.dtype))
        begin += part.nbytes + -part.nbytes % _ALIGNMENT
    return parts


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
