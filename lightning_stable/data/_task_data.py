"""Classification datasets of any kind as a task stream reads them: opened, their labels checked, samples changed."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from typing_extensions import override

from lightning_stable.data.digits import read_digits

__all__ = ["Permutation", "Rotation", "TaskDataset", "open_dataset", "read_labels"]

Source = str | Dataset[Any] | Callable[..., Dataset[Any]]


@dataclass(frozen=True)
class Rotation:
    """Turn images about their centre.

    Pixels are interpolated bilinearly, what comes from outside is 0. 0 degrees change nothing.

    Args:
        angle: Degrees, counter-clockwise.
    """

    angle: float

    def __call__(self, image: Any) -> Tensor:
        """Return the image, of shape (height, width) or (channels, height, width), turned."""
        if not isinstance(image, Tensor) or image.dim() not in (2, 3) or not image.is_floating_point():
            raise ValueError(
                f"TaskStream(domain='rotation') turns images: floating-point tensors of shape (height, width) or "
                f"(channels, height, width), but a sample is {_describe(image)}. Convert it in the dataset, or take "
                "domain='permutation'."
            )
        if self.angle % 360 == 0:
            return image
        height, width = image.shape[-2:]
        cos, sin = (float(f(torch.tensor(self.angle, dtype=torch.float64).deg2rad())) for f in (torch.cos, torch.sin))
        # In units of half the sides, so that images that are not square are turned and not sheared.
        matrix = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], dtype=image.dtype)
        images = image.reshape(1, -1, height, width)
        grid = affine_grid(matrix.unsqueeze(0), list(images.shape), align_corners=False)
        return grid_sample(images, grid, align_corners=False).reshape(image.shape)


@dataclass(frozen=True)
class Permutation:
    """Put the pixels of an image, or the entries of a vector, in another order; the same in all channels.

    Args:
        key: Seed of the order; ``None`` changes nothing.
    """

    key: int | None

    def __call__(self, sample: Any) -> Tensor:
        """Return the sample, a tensor of one or more dimensions, in the new order."""
        if not isinstance(sample, Tensor) or sample.dim() == 0:
            raise ValueError(
                f"TaskStream(domain='permutation') needs samples that are tensors of one or more dimensions, but one "
                f"is {_describe(sample)}. Convert it in the dataset."
            )
        if self.key is None:
            return sample
        flat = sample.flatten(-2) if sample.dim() > 1 else sample
        order = torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(self.key))
        return flat[..., order].reshape(sample.shape)


class TaskDataset(Dataset[tuple[Any, int]]):
    """The samples of a stream: those of a dataset, with classes for labels, once for each change if there are any.

    Sample ``i`` is sample ``i % n`` of the dataset's n, changed by ``changes[i // n]``.

    Args:
        dataset: Map-style dataset of ``(x, y)``.
        classes: The class of each of its samples, from 0; -1 for samples that no task has.
        changes: What is done to x.
    """

    def __init__(
        self, dataset: Dataset[Any], classes: Tensor, changes: Sequence[Callable[[Any], Any]] | None = None
    ) -> None:
        self.dataset = dataset
        self.classes = classes
        self.changes = changes

    def __len__(self) -> int:
        return len(self.classes) * (1 if self.changes is None else len(self.changes))

    @override
    def __getitem__(self, index: int) -> tuple[Any, int]:
        change, place = divmod(int(index), len(self.classes))
        x = self.dataset[place][0]
        return x if self.changes is None else self.changes[change](x), int(self.classes[place])


def open_dataset(source: Source, arguments: dict[str, Any] | None) -> Dataset[Any]:
    """Return the map-style dataset that ``dataset`` and ``dataset_args`` of a task stream name.

    Raises:
        ValueError: If it cannot be found, or what is found is no map-style dataset with samples.
    """
    if isinstance(source, str) and source != "digits":
        source = _imported(source)
    if arguments and (source == "digits" or isinstance(source, Dataset)):
        raise ValueError(
            f"TaskStream(dataset_args={arguments!r}) goes with a dotted path or a function in dataset, "
            f"got dataset={source!r}."
        )
    if source == "digits":
        return read_digits()
    dataset: Any = source if isinstance(source, Dataset) or not callable(source) else _called(source, arguments or {})
    indexed = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    if not indexed or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"TaskStream needs a map-style dataset, one with __getitem__ and a length, got {_describe(dataset)} from "
            f"dataset={source!r}. Read the samples of an iterable one into a TensorDataset."
        )
    if len(dataset) == 0:
        raise ValueError(f"TaskStream(dataset={source!r}) has no samples.")
    return cast("Dataset[Any]", dataset)


def read_labels(dataset: Any) -> Tensor:
    """Return the label of each sample, int64 of shape (n,).

    They come from the dataset's ``targets``, if it has one for each sample and no ``target_transform``, or from the
    tensors of a ``TensorDataset``. Otherwise each sample is read once; random numbers are left as they were.

    Raises:
        ValueError: If samples are no pairs, or labels no integers.
    """
    with isolate_rng():
        first = dataset[0]
        if not isinstance(first, (tuple, list)) or len(first) != 2:
            raise ValueError(
                f"TaskStream needs samples that are pairs (x, y), but sample 0 is {_describe(first)}. Wrap the dataset."
            )
        known = _known_labels(dataset)
        if known is not None:
            return known
        return torch.tensor([_label(dataset[place][1], place) for place in range(len(dataset))], dtype=torch.int64)


def _imported(path: str) -> Any:
    """Return what a dotted path names."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = error if module and name else "it has no module before a dot and no name after it"
        raise ValueError(
            f"TaskStream(dataset={path!r}) is neither 'digits' nor the dotted path of a function or class that can be "
            f"imported: {reason}. Give 'digits', a path such as 'my_package.my_module.make_dataset' of what returns a "
            "map-style dataset of (x, y), or in Python the function or the dataset itself."
        ) from error


def _called(source: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Return what the function or class gives, once its signature has taken the arguments."""
    try:
        signature = inspect.signature(source)
    except (TypeError, ValueError):  # some classes written in C have none
        return source(**arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        name = getattr(source, "__qualname__", repr(source))
        raise ValueError(
            f"TaskStream(dataset_args={arguments!r}) does not fit dataset={name}: {error}. "
            f"It is called as {name}{signature}."
        ) from error
    return source(**arguments)


def _known_labels(dataset: Any) -> Tensor | None:
    """Return the labels that a dataset holds beside its samples, if they are of one piece and integers."""
    found = dataset.tensors[1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)
    if found is None or getattr(dataset, "target_transform", None) is not None:
        return None
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.shape != (len(dataset),) or labels.is_floating_point() or labels.dtype is torch.bool:
        return None
    return labels.to(device="cpu", dtype=torch.int64)


def _label(label: Any, place: int) -> int:
    array = label.numpy() if isinstance(label, Tensor) else label
    kind = getattr(getattr(array, "dtype", None), "kind", "i" if type(array) is int else None)
    if kind not in ("i", "u") or getattr(array, "ndim", 0) != 0:
        raise ValueError(
            f"TaskStream needs labels that are integers, but that of sample {place} is {_describe(label)}. Give an int "
            "or an integer tensor without dimensions, not names, scores or one-hot vectors."
        )
    return int(label)


def _describe(thing: Any) -> str:
    if hasattr(thing, "dtype") and hasattr(thing, "shape"):
        return f"a {type(thing).__name__} of shape {tuple(thing.shape)} and {thing.dtype}"
    text = repr(thing)
    return f"{text if len(text) <= 60 else '...'} ({type(thing).__name__})"
