"""Take batches of any structure apart into samples, keep some of them, and put batches together again."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection, is_dataclass_instance
from torch import Tensor

__all__ = [
    "SampleShape",
    "SampleStore",
    "count_samples",
    "find_labels",
    "rebuild",
    "sample_rows",
    "sample_shapes",
    "take_samples",
]

_LABEL_KEYS = ("labels", "label", "y", "targets", "target")

# What describes one tensor of a sample: where it is, as in "['labels']", its shape without the batch, and its dtype.
SampleShape = tuple[str, tuple[int, ...], torch.dtype]


def count_samples(batch: Any, owner: str) -> int:
    """Return how many samples a batch has: the first dimension, which all its tensors have in common.

    Args:
        batch: Tensors, in mappings, sequences, named tuples and dataclasses of any depth.
        owner: Class name of the callback, for messages.

    Raises:
        ValueError: If there is no such dimension, or the batch holds other values beside tensors and ``None``.
    """
    other = next(_others(batch), None)
    if other is not None:
        raise ValueError(
            f"{owner} takes batches apart into samples, and this one holds a {type(other).__name__}, of which nobody "
            "can tell which part belongs to which sample. Let the loader return tensors with one row for each sample, "
            "in tuples, lists, dictionaries or dataclasses."
        )
    tensors = [tensor for _, tensor in _walk(batch)]
    sizes = {len(tensor) if tensor.ndim else None for tensor in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "none"
        raise ValueError(
            f"{owner} takes batches apart into samples, along a first dimension that all tensors of the batch have in "
            f"common. This {type(batch).__name__} has tensors of the shapes: {shapes}. Let the loader return tensors "
            "with one row for each sample, in tuples, lists, dictionaries or dataclasses."
        )
    return int(sizes.pop() or 0)


def sample_shapes(batch: Any) -> list[SampleShape]:
    """Return what one sample looks like, tensor by tensor: the same in whichever order a dictionary has its keys."""
    return _shapes(sample_rows(batch))


def sample_rows(batch: Any) -> dict[str, Tensor]:
    """Return the tensors of a batch by where they are in it, as in ``"['labels']"``, sorted by that."""
    return dict(sorted(_walk(batch), key=lambda found: found[0]))


def rebuild(batch: Any) -> Any:
    """Return the same tensors in new containers: what a training step takes out of a dictionary is still in this."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor)


def take_samples(batch: Any, indices: Tensor) -> Any:
    """Return these samples of a batch, in the batch's structure.

    Args:
        batch: What :func:`count_samples` accepts.
        indices: Which samples, in which order.
    """
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[indices.to(tensor.device)])


def find_labels(batch: Any, labels: str | None, owner: str) -> Tensor:
    """Return the labels of a batch.

    Args:
        batch: The batch.
        labels: The key, the attribute or, as in ``"1"``, the position of the labels. ``None``: the second entry of a
            tuple or list, or what is called "labels", "label", "y", "targets" or "target".
        owner: Class name of the callback, for messages.

    Raises:
        ValueError: If there is no tensor under that name.
    """
    found = _entry(batch, labels) if labels is not None else _usual_entry(batch)
    if isinstance(found, Tensor):
        return found
    asked = f"labels={labels!r}" if labels is not None else f"a second entry or one of {', '.join(_LABEL_KEYS)}"
    raise ValueError(
        f"{owner} looks for the labels of the batch at {asked}, and this {type(batch).__name__} has no tensor there: "
        f"{_describe(batch)}. Name the key, the attribute or the position, as in labels='1', with the argument labels."
    )


class SampleStore:
    """A fixed number of samples on the CPU, each a row in some tensors that are known by where they are in a batch.

    Args:
        capacity: The largest number of samples.
        owner: Class name of the callback, for messages.
    """

    def __init__(self, capacity: int, owner: str) -> None:
        self.capacity = capacity
        self._owner = owner
        self._size = 0
        # Each tensor by where it is in a batch; rows from the size on are room to grow.
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self._size

    @property
    def shapes(self) -> list[SampleShape] | None:
        """What a sample looks like; ``None`` as long as there is none."""
        return _shapes(self._rows) if self._size else None

    def put(self, batch: Any, sources: list[int], places: list[int]) -> None:
        """Keep samples of a batch, each in its place; where a place comes twice, the later one stays.

        Args:
            batch: What :func:`count_samples` accepts.
            sources: Which samples.
            places: Where each goes: over the sample that is there, or at the end if it is the number of samples.

        Raises:
            ValueError: If the samples do not look like those that are kept already.
        """
        last = dict(zip(places, sources, strict=True))
        which = torch.tensor(list(last.values()), dtype=torch.long)
        rows = {path: tensor.detach()[which.to(tensor.device)] for path, tensor in sample_rows(batch).items()}
        self.put_rows(rows, list(last))

    def put_rows(self, rows: Mapping[str, Tensor], places: list[int]) -> None:
        """Keep samples, each in its place, as :meth:`put` does.

        Args:
            rows: Their tensors, as :func:`sample_rows` returns them.
            places: Where each goes, each place once.
        """
        if not places:
            return
        self.check(_shapes(rows))
        size = max(self._size, max(places) + 1)
        if size > self.capacity or size - self._size > sum(place >= self._size for place in places):
            raise ValueError(f"{self._owner}: places {places} leave a gap in, or the end of, {self.capacity} samples.")
        self._grow(size, rows)
        at = torch.tensor(places)
        for path, kept in self._rows.items():
            kept[at] = rows[path].detach().cpu()
        self._size = size

    def check(self, shapes: list[SampleShape]) -> None:
        """Raise ``ValueError`` if samples of these shapes do not look like those that are kept."""
        if self.shapes is None or shapes == self.shapes:
            return
        if [path for path, *_ in shapes] != list(self._rows):
            raise ValueError(
                f"{self._owner} keeps samples to train on them again in one batch, so they have to look alike. Those "
                f"kept have tensors at {_show_paths(self.shapes)}, this batch at {_show_paths(shapes)}. Let the loader "
                "return the same entries in each batch."
            )
        raise ValueError(
            f"{self._owner} keeps samples to train on them again in one batch, so they have to look alike. Those "
            f"kept have tensors of {_show(self.shapes)}, this batch of {_show(shapes)}. Pad sequences to one "
            "length for the whole run, and crop or resize images to one size."
        )

    def batch(self, places: list[int], like: Any, device: torch.device | None = None) -> Any:
        """Return the samples at these places as one batch.

        Args:
            places: Which samples, in which order.
            like: A batch in whose structure they are put.
            device: Where the batch is to be; ``None``: each tensor where that of ``like`` is.

        Raises:
            ValueError: If ``like`` holds other samples than those that are kept.
        """
        self.check(sample_shapes(like))
        at = torch.tensor(places, dtype=torch.long)
        found = iter([self._rows[path][at] for path, _ in _walk(like)])
        return apply_to_collection(like, Tensor, lambda tensor: next(found).to(device or tensor.device))

    def clear(self) -> None:
        """Forget all samples."""
        self._size, self._rows = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the samples, as copies without the room to grow."""
        return {"rows": [rows[: self._size].clone() for rows in self._rows.values()], "paths": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the samples of a checkpoint.

        Raises:
            ValueError: If they are more than there is room for.
        """
        rows = [tensor.detach().cpu().clone() for tensor in state["rows"]]
        size = len(rows[0]) if rows else 0
        if size > self.capacity:
            raise ValueError(
                f"{self._owner}: the checkpoint has {size} samples, and there is room for {self.capacity}. Resume "
                "with the same settings."
            )
        self._size, self._rows = size, dict(zip(state["paths"], rows, strict=True))

    def _grow(self, size: int, like: Mapping[str, Tensor]) -> None:
        """Make room for so many samples: twice as much as before, so that samples are seldom copied."""
        if not self._rows:
            self._rows = {path: torch.empty(0, *like[path].shape[1:], dtype=like[path].dtype) for path in like}
        present = len(next(iter(self._rows.values())))
        if size > present:
            room = min(self.capacity, max(size, 2 * present)) - present
            for path, rows in self._rows.items():
                self._rows[path] = torch.cat([rows, rows.new_zeros(room, *rows.shape[1:])])


def _walk(batch: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield where each tensor of a batch is, and the tensor, in the order in which it is put together again."""
    parts: list[tuple[str, Any]] = []
    if isinstance(batch, Tensor):
        yield path, batch
    elif is_dataclass_instance(batch):
        parts = [(f".{field.name}", getattr(batch, field.name)) for field in dataclasses.fields(batch) if field.init]
    elif isinstance(batch, Mapping):
        parts = [(f"[{key!r}]", part) for key, part in batch.items()]
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        parts = [(f"[{number}]", part) for number, part in enumerate(batch)]
    for step, part in parts:
        yield from _walk(part, path + step)


def _shapes(rows: Mapping[str, Tensor]) -> list[SampleShape]:
    """Return what one sample looks like."""
    return [(path, tuple(tensor.shape[1:]), tensor.dtype) for path, tensor in rows.items()]


def _others(batch: Any) -> Iterator[Any]:
    """Yield what a batch holds beside tensors and ``None``."""
    if batch is None or isinstance(batch, Tensor):
        return
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        parts = list(batch)
    elif is_dataclass_instance(batch):
        parts = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    else:
        yield batch
        return
    for part in parts:
        yield from _others(part)


def _usual_entry(batch: Any) -> Any:
    """Return what stands where labels usually do."""
    if isinstance(batch, Sequence) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    return next((found for key in _LABEL_KEYS if (found := _entry(batch, key)) is not None), None)


def _entry(batch: Any, name: str) -> Any:
    """Return what a batch has under this name, ``None`` if there is nothing."""
    if isinstance(batch, Mapping) and name in batch:
        return batch[name]
    if isinstance(batch, Sequence) and name.isdecimal():
        return batch[int(name)] if int(name) < len(batch) else None
    return getattr(batch, name, None)


def _describe(batch: Any) -> str:
    """Say what a batch is made of."""
    if isinstance(batch, Mapping):
        return f"its keys are {', '.join(map(repr, batch))}"
    if isinstance(batch, Sequence):
        return f"its entries are {', '.join(type(entry).__name__ for entry in batch)}"
    return "it is neither a mapping nor a sequence"


def _show(shapes: list[SampleShape]) -> str:
    return ", ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for _, shape, dtype in shapes) or "no shape"


def _show_paths(shapes: list[SampleShape]) -> str:
    return ", ".join(path or "the top" for path, *_ in shapes) or "no place"
