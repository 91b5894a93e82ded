"""What the tasks of a stream are: classes, domains, blurry boundaries, halves; any dataset; what is refused."""

import itertools
import re

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from lightning_stable.data._task_data import Permutation, Rotation
from lightning_stable.data.digits import read_digits
from lightning_stable.data.task_stream import TaskStream


class Points(Dataset):
    """Pairs without ``targets``; drawing a random number at each read, as an augmentation does."""

    def __init__(self, labels: list[int], x: str | None = None):
        self.labels, self.x = labels, x

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        torch.rand(1)
        return torch.tensor([float(index)]) if self.x is None else self.x, self.labels[index]


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1), 0


def points(classes=6, each=20):
    return Points([index % classes for index in range(classes * each)])


def make_points(classes=6, each=20):
    return points(classes, each)


def stream(**settings):
    return TaskStream(**{"batch_size": 8, "tasks": 3, **settings})


def held_out(made):
    return [set(loader.dataset.indices) for loader in made.task_dataloaders()]


def trained(made):
    """The samples of each task in one epoch, as pairs of their index and their class; batches of one leave none out."""
    loader = made.train_dataloader()
    order = list(loader.sampler)
    bounds = [step * made.batch_size for step in (0, *made.task_steps)] + [len(order)]
    classes = loader.dataset.classes
    return [
        [(index, int(classes[index % len(classes)])) for index in order[first:last]]
        for first, last in itertools.pairwise(bounds)
    ]


# ----------------------------------------------------------------------------- classes


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_each_task_has_its_own_classes(scenario):
    made = stream(scenario=scenario, batch_size=1, tasks=4)
    assert made.task_incremental is (scenario == "task")
    assert sorted(len(classes) for classes in made.task_classes) == [2, 2, 3, 3]
    assert sorted(itertools.chain(*made.task_classes)) == list(range(10))
    everything = []
    for task, (samples, held) in enumerate(zip(trained(made), held_out(made), strict=True)):
        assert {number for _, number in samples} == set(made.task_classes[task])
        indices = [index for index, _ in samples]
        assert not held & set(indices)
        everything += [*indices, *held]
    assert sorted(everything) == list(range(1797))
    for task, loader in enumerate(made.task_dataloaders()):
        labels = torch.cat([y for _, y in loader])
        assert labels.unique().tolist() == made.task_classes[task]
        assert labels.dtype is torch.int64


def test_the_order_of_classes_is_given_or_follows_the_seed():
    given = stream(class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], tasks=5)
    assert given.task_classes == [[8, 9], [6, 7], [4, 5], [2, 3], [0, 1]]
    assert given.task_names[0] == "classes 8, 9"
    assert stream().task_classes == stream().task_classes != stream(seed=1).task_classes
    assert len(set(stream(tasks=10).task_names)) == 10
    assert stream(dataset=points(14), tasks=2, class_order=list(range(14))).task_names == [
        "classes 0, 1, 2, 3, 4, 5 and 1 more",
        "classes 7, 8, 9, 10, 11, 12 and 1 more",
    ]


def test_the_same_share_of_each_class_is_held_out():
    made = stream(dataset=points(4, 25), validation_share=0.2, tasks=2, batch_size=1)
    labels = torch.cat([y for _, y in made.val_dataloader()])
    assert labels.bincount().tolist() == [5] * 4
    assert stream(seed=1).val_dataloader().dataset.indices != stream().val_dataloader().dataset.indices


# ----------------------------------------------------------------------------- domains


@pytest.mark.parametrize("domain", ["rotation", "permutation"])
def test_each_domain_has_all_samples_changed_in_its_own_way(domain):
    made = stream(scenario="domain", domain=domain)
    assert made.task_classes == [list(range(10))] * 3
    parts = held_out(made)
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert len(made.val_dataloader().dataset) == sum(map(len, parts)) == 3 * len(parts[0])
    first, second, third = (torch.cat([x for x, _ in loader]) for loader in made.task_dataloaders())
    labels = [torch.cat([y for _, y in loader]) for loader in made.task_dataloaders()]
    assert torch.equal(labels[0], labels[1])
    images = read_digits().tensors[0]
    assert torch.equal(first, images[sorted(parts[0])])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    again = torch.cat([x for x, _ in stream(scenario="domain", domain=domain).task_dataloaders()[1]])
    assert torch.equal(second, again)


def test_angles_are_given_or_evenly_spaced():
    assert stream(scenario="domain", tasks=4).task_names == ["rotation 0", "rotation 45", "rotation 90", "rotation 135"]
    assert stream(scenario="domain", angles=[10, 45, 80]).task_names == ["rotation 10", "rotation 45", "rotation 80"]


@pytest.mark.parametrize("shape", [(5, 5), (3, 6, 6), (1, 8, 8)])
def test_rotations_turn_counter_clockwise(shape):
    image = torch.rand(shape)
    assert Rotation(0)(image) is Rotation(360)(image) is image
    for quarter in (1, 2, 3):
        turned = Rotation(90.0 * quarter)(image)
        torch.testing.assert_close(turned, torch.rot90(image, quarter, (-2, -1)), rtol=0, atol=1e-4)
    half = Rotation(180)(torch.rand(2, 4, 7))
    assert half.shape == (2, 4, 7)


def test_rotations_of_images_that_are_not_square_do_not_shear():
    """A dot 3 pixels to the right of the centre comes to lie 3 pixels above it."""
    image = torch.zeros(9, 15)
    image[4, 10] = 1
    assert Rotation(90)(image)[1, 7] == pytest.approx(1, abs=1e-4)


def test_permutations_keep_the_pixels_and_are_the_same_in_all_channels():
    image = torch.arange(32.0).view(2, 4, 4)
    moved = Permutation(5)(image)
    assert torch.equal(moved[1] - 16, moved[0])
    assert sorted(moved.flatten().tolist()) == list(range(32))
    assert not torch.equal(moved, image)
    assert Permutation(None)(image) is image
    assert sorted(Permutation(5)(torch.arange(9)).tolist()) == list(range(9))


# ----------------------------------------------------------------------------- blurry


@pytest.mark.parametrize("seed", range(4))
def test_blurry_tasks_share_the_asked_share_of_samples(seed):
    made = stream(
        dataset=points(20, 50),
        scenario="blurry",
        tasks=4,
        batch_size=1,
        seed=seed,
        disjoint_share=0.5,
        blurry_share=0.2,
    )
    home = {number: task for task, classes in enumerate(made.task_classes) for number in classes}
    assert sorted(home) == list(range(20))
    assert all(made.task_classes)
    samples = [(task, number) for task, part in enumerate(trained(made)) for _, number in part]
    assert len(samples) == 20 * 40
    abroad = [number for task, number in samples if home[number] != task]
    assert len(set(abroad)) <= 10
    assert len(abroad) == 10 * 40 * 0.2
    for task, loader in enumerate(made.task_dataloaders()):
        assert torch.cat([y for _, y in loader]).unique().tolist() == made.task_classes[task]


def test_blurry_draws_are_random_and_seeded():
    def drawn(seed):
        made = stream(dataset=points(20, 50), scenario="blurry", tasks=4, seed=seed, batch_size=1)
        return made.task_classes, [len(part) for part in trained(made)]

    assert drawn(0) == drawn(0)
    assert len({tuple(map(len, drawn(seed)[0])) for seed in range(6)}) > 1  # how many classes a task has
    assert len({str(drawn(seed)[1]) for seed in range(6)}) == 6


@pytest.mark.parametrize("shares", [{"disjoint_share": 1.0, "blurry_share": 0.9}, {"blurry_share": 0.0}])
def test_without_blurry_samples_classes_stay_in_their_tasks(shares):
    made = stream(scenario="blurry", batch_size=1, **shares)
    for task, samples in enumerate(trained(made)):
        assert {number for _, number in samples} == set(made.task_classes[task])


def test_a_class_is_evaluated_where_most_of_its_samples_are():
    made = stream(scenario="blurry", tasks=2, batch_size=1, disjoint_share=0.5, blurry_share=0.8, seed=1)
    counts = torch.zeros(10, 2)
    for task, samples in enumerate(trained(made)):
        for _, number in samples:
            counts[number, task] += 1
    for number in range(10):
        assert number in made.task_classes[int(counts[number].argmax())]
    alone = stream(scenario="blurry", tasks=1, blurry_share=1.0)
    assert alone.task_classes == [list(range(10))]


# ----------------------------------------------------------------------------- two phases


@pytest.mark.parametrize("scenario", ["class", "domain", "blurry"])
def test_the_two_phases_have_different_classes_from_zero_on(scenario):
    halves = []
    for phase in ("tune", "evaluate"):
        made = stream(protocol="two-phase", phase=phase, scenario=scenario)
        assert made.num_classes == 5
        assert sorted({number for classes in made.task_classes for number in classes}) == list(range(5))
        images, labels = next(iter(made.train_dataloader()))
        assert labels.max() < 5
        digits = read_digits()
        if scenario != "domain":
            for image, label in zip(images, labels, strict=True):
                (place,) = (digits.tensors[0] == image).flatten(1).all(1).nonzero()[0].tolist()
                assert int(digits.tensors[1][place]) == made.original_labels[label]
        halves.append(made.original_labels)
    assert sorted(itertools.chain(*halves)) == list(range(10))


def test_halves_of_an_odd_number_of_classes_are_equal():
    tune, evaluate = (
        stream(dataset=points(7), protocol="two-phase", phase=phase, tasks=3, batch_size=2).original_labels
        for phase in ("tune", "evaluate")
    )
    assert len(tune) == len(evaluate) == 3
    assert not set(tune) & set(evaluate)


# ----------------------------------------------------------------------------- datasets


@pytest.mark.parametrize(
    "source",
    [
        {"dataset": points()},
        {"dataset": points},
        {"dataset": "test_task_stream_scenarios.make_points"},
        {"dataset": make_points, "dataset_args": {"classes": 6, "each": 20}},
        {"dataset": Points([np.int32(index % 6) for index in range(120)])},
        {"dataset": Points([torch.tensor(index % 6) for index in range(120)])},
        {"dataset": TensorDataset(torch.arange(120.0)[:, None], torch.arange(120, dtype=torch.uint8) % 6)},
        {"dataset": Subset(points(6, 40), range(120))},
    ],
)
def test_any_classification_dataset(source):
    before = torch.get_rng_state()
    made = stream(**source)
    made.setup("fit")
    assert torch.equal(torch.get_rng_state(), before)
    assert made.num_classes == 6
    for x, y in made.train_dataloader():
        assert torch.equal(x.flatten().long() % 6, y)


def test_labels_with_gaps_are_counted_from_zero():
    made = stream(dataset=Points([(7, -3, 40)[index % 3] for index in range(60)]))
    assert made.num_classes == 3
    assert made.original_labels == [-3, 7, 40]
    for x, y in made.val_dataloader():
        assert y.tolist() == [(1, 0, 2)[int(index) % 3] for index in x]


def test_targets_are_trusted_unless_they_are_transformed():
    class Known(Points):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    known = Known([index % 3 for index in range(60)])
    known.targets = list(known.labels)
    assert stream(dataset=known).num_classes == 3
    assert known.reads == 1
    known.target_transform, known.targets = (lambda y: y), [0] * 60
    assert stream(dataset=known).num_classes == 3


def test_a_dataset_by_class_path_in_a_config(tmp_path):
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(TaskStream, "data")
    inner = {"class_path": "test_task_stream_scenarios.Points", "init_args": {"labels": [0, 1, 2] * 20}}
    config = parser.parse_object(
        {
            "data": {
                "class_path": "lightning_stable.data.task_stream.TaskStream",
                "init_args": {"dataset": inner, "tasks": 3},
            }
        }
    )
    assert parser.instantiate_classes(config).data.num_classes == 3


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenario": "online"}, "scenario must be one of class, task, domain, blurry, got 'online'"),
        ({"domain": "noise"}, "domain must be one of rotation, permutation, got 'noise'"),
        ({"protocol": "three"}, "protocol must be one of standard, two-phase, got 'three'"),
        ({"tasks": 0}, "tasks must be a whole number from 1 on, got 0"),
        ({"epochs_per_task": 1.5}, "epochs_per_task must be a whole number from 1 on, got 1.5"),
        ({"disjoint_share": 1.1}, "disjoint_share must lie in [0, 1], got 1.1"),
        ({"blurry_share": -0.1}, "blurry_share must lie in [0, 1], got -0.1"),
        ({"blurry_share": float("nan")}, "blurry_share must lie in [0, 1], got nan"),
        ({"scenario": "domain", "class_order": [0]}, "class_order goes with scenario='class' or 'task'"),
        ({"angles": [0, 1, 2]}, "angles go with scenario='domain' and domain='rotation', got scenario='class'"),
        ({"scenario": "domain", "angles": [0, 1]}, "angles must be 3 different ones"),
        ({"scenario": "domain", "angles": [0, 90, 450]}, "angles must be 3 different ones"),
        ({"protocol": "two-phase"}, "needs phase='tune' or 'evaluate', got phase=None"),
        ({"phase": "tune"}, "TaskStream(phase='tune') goes with protocol='two-phase'"),
        ({"batch_size": 0}, "batch_size must be 1 or more samples, got 0"),
        ({"validation_share": 0.0}, "validation_share must lie between 0 and 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": 11}, "TaskStream(tasks=11) needs a class for each task, there are 10"),
        ({"tasks": 6, "protocol": "two-phase", "phase": "tune"}, "tasks=6) needs a class for each task, there are 5"),
        ({"tasks": 11, "scenario": "blurry"}, "tasks=11) needs a class for each task, there are 10"),
        ({"class_order": [0, 1, 1]}, "has to name each of the classes 0..9 once"),
        (
            {"scenario": "blurry", "tasks": 10, "disjoint_share": 0.0, "blurry_share": 1.0},
            "has the most samples of no class",
        ),
        ({"dataset": "digts"}, "dataset='digts') is neither 'digits' nor the dotted path"),
        ({"dataset": "no.such.thing"}, "No module named 'no'"),
        ({"dataset": "lightning_stable.data.digits.letters"}, "has no attribute 'letters'"),
        ({"dataset": "digits", "dataset_args": {"a": 1}}, "dataset_args={'a': 1}) goes with a dotted path"),
        ({"dataset": Endless()}, "needs a map-style dataset, one with __getitem__ and a length"),
        ({"dataset": lambda: 3}, "needs a map-style dataset, one with __getitem__ and a length, got 3 (int)"),
        ({"dataset": Points([])}, "has no samples"),
        ({"dataset": Points([0])}, "class 0 has 1 sample(s); each needs two or more"),
        ({"dataset": Points([0, 0.5])}, "labels that are integers, but that of sample 1 is 0.5 (float)"),
        ({"dataset": Points([0, True])}, "sample 1 is True (bool)"),
        ({"dataset": Points(["cat"] * 4)}, "sample 0 is 'cat' (str)"),
        ({"dataset": Points([torch.eye(3)[0].long()] * 4)}, "sample 0 is a Tensor of shape (3,) and torch.int64"),
        (
            {"dataset": TensorDataset(torch.zeros(8, 1), torch.zeros(8))},
            "sample 0 is a Tensor of shape () and torch.fl",
        ),
        ({"dataset": TensorDataset(torch.zeros(8, 1))}, "samples that are pairs (x, y)"),
        ({"dataset": points(1), "protocol": "two-phase", "phase": "tune"}, "needs two classes or more"),
        ({"dataset": points(), "scenario": "domain"}, "turns images: floating-point tensors of shape"),
        (
            {"dataset": Points([0, 1] * 9, x="image"), "scenario": "domain", "domain": "permutation"},
            "needs samples that are tensors of one or more dimensions, but one is 'image' (str)",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(**settings).setup("fit")


def test_a_batch_larger_than_a_task_is_an_error():
    made = stream(batch_size=500, class_order=list(range(10)))
    with pytest.raises(
        ValueError, match=r"batch_size=500 on 1 process\(es\) needs 500 .* task 1 \(classes 4, 5, 6\) has 436"
    ):
        made.train_dataloader()


@pytest.mark.parametrize("task", [-1, 3, True, 1.0])
def test_a_task_that_does_not_exist_is_an_error(task):
    with pytest.raises(ValueError, match=r"start_task\(.*\): the tasks are 0\.\.2, or None"):
        stream().start_task(task)
