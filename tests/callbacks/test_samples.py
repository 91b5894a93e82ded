"""Batches of any structure taken apart into samples, kept, and put together again."""

import copy
import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BatchEncoding
from transformers.modeling_outputs import ModelOutput

from lightning_stable.callbacks._samples import SampleStore, count_samples, find_labels, rebuild, take_samples
from lightning_stable.callbacks.ewc import EWC
from lightning_stable.callbacks.replay import Replay
from lightning_stable.testing.harness import Net, fit

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Item:
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Output(ModelOutput):
    x: Any = None
    y: Any = None


def numbers(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.arange(2.0 * size).view(size, 2), torch.arange(size) + 10


STRUCTURES: dict[str, Any] = {
    "tensor": lambda x, y: x,
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dictionary": lambda x, y: {"x": x, "labels": y},
    "ordered dictionary": lambda x, y: OrderedDict(y=y, x=x),
    "named tuple": Pair,
    "dataclass": Item,
    "nested": lambda x, y: ([x, {"deep": (y, None)}], y.clone()),
    "batch encoding": lambda x, y: BatchEncoding({"input_ids": x, "labels": y}),
    "model output": lambda x, y: Output(x=x, y=y),
}


def flat(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, by hand."""
    if isinstance(batch, Tensor):
        return [batch]
    if hasattr(batch, "keys"):
        return [tensor for key in sorted(batch.keys()) for tensor in flat(batch[key])]
    if isinstance(batch, Item):
        return [batch.x, batch.y]
    return [] if batch is None else [tensor for part in batch for tensor in flat(part)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_is_taken_apart_and_put_together(structure: str) -> None:
    batch, like = STRUCTURES[structure](*numbers()), STRUCTURES[structure](*numbers(1))
    assert count_samples(batch, "Owner") == 4
    part = take_samples(batch, torch.tensor([2, 0]))
    assert type(part) is type(batch)
    store = SampleStore(3, "Owner")
    store.put(batch, [2, 0], [0, 1])
    assert len(store) == 2
    found = store.batch([1, 0, 1], like, torch.device("cpu"))
    assert type(found) is type(batch)
    for whole, taken, kept in zip(flat(batch), flat(part), flat(found), strict=True):
        assert torch.equal(taken, whole[[2, 0]])
        assert torch.equal(kept, whole[[0, 2, 0]])
        assert kept.dtype == whole.dtype


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (torch.tensor(1.0), r"tensors of the shapes: \(\)"),
        ((torch.zeros(3, 2), torch.zeros(4)), r"tensors of the shapes: \(3, 2\), \(4,\)"),
        ([], "This list has tensors of the shapes: none"),
        ({"x": torch.zeros(3), "names": ["a", "b", "c"]}, "holds a str"),
        ((torch.zeros(3), 5), "holds a int"),
        (object(), "holds a object"),
    ],
    ids=["no dimension", "two sizes", "nothing", "strings", "a number", "an object"],
)
def test_says_what_cannot_be_taken_apart(batch: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^Owner takes batches apart into samples.*{says}"):
        count_samples(batch, "Owner")


def test_places_are_filled_replaced_and_bounded() -> None:
    store, (x, y) = SampleStore(5, "Owner"), numbers(6)
    store.put((x, y), [], [])
    assert len(store) == 0
    store.put((x, y), [0, 1, 2], [0, 1, 2])
    store.put((x, y), [3, 4, 5], [3, 1, 1])  # the last one stays
    assert store.batch([0, 1, 2, 3], (x, y))[1].tolist() == [10, 15, 12, 13]
    store.put((x, y), [0, 1], [4, 0])
    assert store.batch([0, 4], (x, y))[1].tolist() == [11, 10]
    for places in ([5], [7]):
        with pytest.raises(ValueError, match="Owner: places"):
            store.put((x, y), [0], places)
    with pytest.raises(ValueError, match="Owner: places"):
        SampleStore(5, "Owner").put((x, y), [0], [1])
    assert len(store) == 5
    store.clear()
    assert (len(store), store.shapes) == (0, None)
    store.put(x.long(), [1], [0])  # of another kind than before


def test_what_is_kept_is_a_copy() -> None:
    store, (x, y) = SampleStore(5, "Owner"), numbers()
    expected = x.clone()
    store.put((x.requires_grad_(), y), [0, 1], [0, 1])
    with torch.no_grad():
        x.zero_()
    found = store.batch([0, 1], (x, y))
    assert not found[0].requires_grad
    assert torch.equal(found[0], expected[:2])
    found[0].zero_()
    assert torch.equal(store.batch([0, 1], (x, y))[0], expected[:2])


def test_state_goes_over() -> None:
    store, batch = SampleStore(100, "Owner"), numbers(40)
    store.put(batch, list(range(40)), list(range(40)))
    store.put(batch, [0], [40])
    state = store.state_dict()
    assert [rows.untyped_storage().nbytes() for rows in state["rows"]] == [41 * 8, 41 * 8], "room to grow is saved, too"
    kept = copy.deepcopy(state)
    other = SampleStore(100, "Owner")
    other.load_state_dict(state)
    for each in (store, other):
        each.put(batch, [5, 6], [0, 41])
    assert all(torch.equal(a, b) for a, b in zip(state["rows"], kept["rows"], strict=True)), "written into a state"
    everything = list(range(42))
    for left, right in zip(store.batch(everything, batch), other.batch(everything, batch), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="the checkpoint has 41 samples, and there is room for 40"):
        SampleStore(40, "Owner").load_state_dict(state)
    empty = SampleStore(3, "Owner")
    empty.load_state_dict(SampleStore(3, "Owner").state_dict())
    assert len(empty) == 0


def test_samples_have_to_look_alike() -> None:
    store = SampleStore(5, "Owner")
    store.put((torch.zeros(2, 7), torch.zeros(2)), [0], [0])
    shapes = r"\(7,\) float32, \(\) float32, this batch of .*Pad"
    paths = r"tensors at \[0\], \[1\], this batch at {}\. Let the loader return the same entries"
    for other, what in [
        ((torch.zeros(2, 9), torch.zeros(2)), shapes),
        ((torch.zeros(2, 7).half(), torch.zeros(2)), shapes),
        (torch.zeros(2, 7), paths.format("the top")),
        ((torch.zeros(2, 7),), paths.format(r"\[0\]")),
        ({"x": torch.zeros(2, 7), "y": torch.zeros(2)}, paths.format(r"\['x'\], \['y'\]")),
    ]:
        says = f"Owner keeps .* {what}"
        with pytest.raises(ValueError, match=says):
            store.put(other, [0], [1])
        with pytest.raises(ValueError, match=says):
            store.batch([0], other)


def test_the_order_of_keys_makes_no_difference() -> None:
    """Two entries of one shape would be taken for each other."""
    store, x = SampleStore(9, "Owner"), torch.arange(4)
    store.put({"ids": x, "labels": x + 10}, [0, 1], [0, 1])
    store.put({"labels": x + 12, "ids": x + 2}, [0, 1], [2, 3])
    for like in ({"ids": x, "labels": x}, {"labels": x, "ids": x}):
        found = store.batch([0, 1, 2, 3], like)
        assert list(found) == list(like)
        assert (found["ids"].tolist(), found["labels"].tolist()) == ([0, 1, 2, 3], [10, 11, 12, 13])
        again = SampleStore(9, "Owner")
        again.load_state_dict(store.state_dict())
        assert torch.equal(again.batch([3], like)["labels"], torch.tensor([13]))


@pytest.mark.parametrize(
    "other",
    [lambda x: {"ids": x, "mask": x}, lambda x: {"ids": x, "labels": (x,)}, lambda x: (x, x), lambda x: Pair(x, x)],
    ids=["another key", "deeper", "a tuple", "a named tuple"],
)
def test_entries_of_other_names_are_no_samples_of_the_same_kind(other: Any) -> None:
    store, x = SampleStore(9, "Owner"), torch.arange(4)
    store.put({"ids": x, "labels": x}, [0], [0])
    with pytest.raises(ValueError, match=r"have tensors at \['ids'\], \['labels'\], this batch at .* same entries"):
        store.put(other(x), [1], [1])
    with pytest.raises(ValueError, match="same entries"):
        store.batch([0], other(x))


def test_containers_are_built_anew_and_tensors_are_not_copied() -> None:
    for make in STRUCTURES.values():
        batch = make(*numbers())
        again = rebuild(batch)
        assert type(again) is type(batch)
        assert isinstance(batch, Tensor) or again is not batch
        assert all(one is other for one, other in zip(flat(again), flat(batch), strict=True))
    inner = {"deep": numbers()[1]}
    again = rebuild([inner])
    inner.pop("deep")
    assert list(again[0]) == ["deep"]


class Lists(Net):
    """Has batches with a list of images, each of 3 rows."""

    def loss(self, batch: Any) -> Tensor:
        images = batch["images"] if isinstance(batch, dict) else batch
        return self.head(self.body(torch.stack(list(images)).flatten(0, 1))).square().mean()


IMAGES = [torch.full((3, 6), float(number)) for number in range(18)]


def listed(collate: Any, batch: int = 8) -> DataLoader:
    return DataLoader(IMAGES, batch_size=batch, collate_fn=collate)


@pytest.mark.parametrize("collate", [list, tuple, lambda images: {"images": images}])
@pytest.mark.parametrize("owner", [Replay(capacity=4), EWC(samples=4)], ids=["Replay", "EWC"])
def test_a_list_with_a_tensor_for_each_sample_is_not_cut_along_another_dimension(owner: Any, collate: Any) -> None:
    says = f"{type(owner).__name__} takes .* a list of 8 tensors, as many as batch_size of its loader, .* 3 rows each"
    with pytest.raises(ValueError, match=says):
        fit([owner], module=Lists(), train=listed(collate), max_epochs=1)


@pytest.mark.parametrize(
    ("collate", "batch"), [(torch.stack, 8), (None, 8), (lambda images: [torch.stack(images)] * 3, 3)]
)
def test_what_is_stacked_is_taken(collate: Any, batch: int) -> None:
    """Three columns of three samples each as well; the last batch of two of them is smaller than their number."""
    images = [image[0] for image in IMAGES[:17]]

    class Stacked(Lists):
        def loss(self, batch: Any) -> Tensor:
            batch = batch[0] if isinstance(batch, (list, tuple)) else batch
            return self.head(self.body(batch)).square().mean()

    replay = Replay(capacity=40)
    fit(
        [replay],
        module=Stacked(norm=False),
        train=DataLoader(images, batch_size=batch, collate_fn=collate),
        max_epochs=1,
    )
    assert len(replay.state_dict()["memory"]["samples"]["rows"][0]) == 17


def test_labels_are_found() -> None:
    x, y = numbers()
    for batch in [(x, y), [x, y], Pair(x, y), Item(x, y), {"x": x, "label": y}, {"input_ids": x, "labels": y}]:
        assert find_labels(batch, None, "Owner") is y
    third = (x, x, y)
    assert find_labels(third, "2", "Owner") is y
    assert find_labels(Pair(x, y), "y", "Owner") is y
    assert find_labels({"a": x, "b": y}, "b", "Owner") is y
    assert find_labels({"a": x, "1": y}, "1", "Owner") is y
    assert find_labels(Item(x, y), "x", "Owner") is x


@pytest.mark.parametrize(
    ("batch", "labels", "says"),
    [
        (torch.zeros(3), None, "at a second entry or one of labels, label, y, targets, target, and this Tensor"),
        ({"a": torch.zeros(3)}, None, "at .*this dict has no tensor there: its keys are 'a'"),
        ((torch.zeros(3), torch.zeros(3)), "2", "at labels='2', .*its entries are Tensor, Tensor"),
        ({"a": torch.zeros(3)}, "b", "at labels='b'"),
        ((torch.zeros(3), ["a"]), "1", "at labels='1'"),
    ],
)
def test_says_where_there_are_no_labels(batch: Any, labels: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=f"^Owner looks for the labels of the batch {says}"):
        find_labels(batch, labels, "Owner")
