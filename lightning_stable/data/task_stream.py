"""Streams of tasks for continual learning, over any classification dataset; handwritten digits are built in.

Use it to see what a model forgets: tasks follow each other, the samples of past ones do not come back, and each task
keeps held-out samples of its own. One pass of the train loader is the whole stream, so ``Trainer(max_epochs=1)`` trains
on all tasks; :meth:`TaskStream.start_task` gives one fit to each task instead. Not for one dataset as a whole: that is
``DigitsDataModule``, or a datamodule of your own.

Scenarios:

* ``"class"``: each task has classes of its own, and all classes compete at evaluation.
* ``"task"``: the same tasks, but the task is known at evaluation, so only its own classes compete. The stream only says
  so (``task_incremental``); what evaluates has to act on it. ``val_dataloader`` knows no tasks.
* ``"domain"``: all classes in every task, of images that are rotated by another angle or whose pixels have another
  order. Task 0 has the images as they are, unless other angles are given.
* ``"blurry"``: Si-Blurry (Moon et al., "Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask
  and Visual Prompt Tuning", ICCV 2023, arXiv 2308.09303). The classes are divided at random into disjoint and blurry
  ones, ``disjoint_share`` of them disjoint, and over the tasks in random numbers. All samples of a disjoint class are
  in its task; ``blurry_share`` of the samples of blurry classes are spread at random over the other tasks. A class is
  evaluated in the task that has the most of its training samples.

Of "blurry" the two shares, the random numbers of classes and the random spread are the paper's. The details of its
text were not seen; three differ from its released code. There a task may get no class, here each gets one at least.
There some classes are left out, so that disjoint and blurry ones are multiples of the number of tasks; here all are in.
There the samples to be spread are shuffled among all tasks, so that some return to their own, and how many each task
gives and takes is cut at random; here exactly ``blurry_share`` of all leave, and each goes to one of the other tasks,
whose chances are random. The defaults are those of the released code: 50 % disjoint classes, 10 % blurry samples.

``protocol="two-phase"`` splits the classes into two halves of different classes. Tune hyperparameters on
``phase="tune"``, report on ``phase="evaluate"``, with the same settings otherwise ("Hyperparameters in Continual
Learning: A Reality Check", arXiv 2403.09066). The paper asks for the same configuration on different datasets; halves
of one are our stand-in for two.

Example:
    >>> from lightning_stable.data.task_stream import TaskStream
    >>> stream = TaskStream(tasks=5, class_order=list(range(10)), batch_size=32)
    >>> stream.setup("fit")
    >>> stream.task_names
    ['classes 0, 1', 'classes 2, 3', 'classes 4, 5', 'classes 6, 7', 'classes 8, 9']
    >>> stream.task_steps  # batches after which tasks 1 to 4 begin
    [9, 18, 27, 36]
    >>> [sorted(set(y.tolist())) for x, y in stream.train_dataloader()][8:10]
    [[0, 1], [2, 3]]
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from typing_extensions import override

from lightning_stable.data import _scenarios as scenarios
from lightning_stable.data._resumable import ResumableLoader, SplitDataModule, is_real
from lightning_stable.data._task_data import Permutation, Rotation, TaskDataset, open_dataset, read_labels
from lightning_stable.data._task_order import ChosenTask, StreamSampler

__all__ = ["TaskStream"]

_CHOICES = {
    "scenario": ("class", "task", "domain", "blurry"),
    "domain": ("rotation", "permutation"),
    "protocol": ("standard", "two-phase"),
}
# What the plan of the tasks follows from, besides the seed.
_SOURCES = (
    "tasks",
    "scenario",
    "class_order",
    "domain",
    "disjoint_share",
    "blurry_share",
    "protocol",
    "phase",
    "validation_share",
)


class TaskStream(SplitDataModule):
    """Tasks that follow each other, in a resumable order, each with held-out samples of its own.

    A batch is ``(x, y)``, with classes as int64 from 0 on, and never of two tasks. A task is trained on for
    ``epochs_per_task`` epochs of its samples, each in an order given by (seed, task, epoch). The incomplete batch at
    the end of each of these epochs is left out, which are other samples in each epoch. So the b-th batches of R
    processes together are the b-th batch of one process with an R times larger batch. ``Trainer(max_epochs=n)`` gives
    the stream n times, with new orders. Under ``Trainer(accumulate_grad_batches=a)`` an update has batches of two
    tasks, unless ``a`` divides the batches of each task (``task_steps``).

    Labels count from 0 in ascending order of those that take part; with labels 0..C-1 and the standard protocol they
    are the dataset's own. ``original_labels`` has the dataset's, ``num_classes`` how wide a head has to be.

    Validation reads the held-out samples of all tasks, in order; so does the test. Each task's are in
    ``task_dataloaders()``. Each process reads the dataset by itself: let it be downloaded before.

    Args:
        dataset: ``"digits"``, the dotted path of a function or class that returns a map-style dataset of ``(x, y)``
            with integer labels, that function, or such a dataset. Labels are read from ``targets`` where there are
            some, otherwise by reading each sample once.
        dataset_args: Arguments of that function or class.
        scenario: ``"class"``, ``"task"``, ``"domain"`` or ``"blurry"``, see above.
        tasks: Number of tasks.
        epochs_per_task: Epochs of its samples that each task is trained on.
        class_order: With ``"class"`` and ``"task"``: all classes, in the order in which tasks take them. Default:
            drawn from the seed.
        domain: With ``"domain"``: ``"rotation"`` or ``"permutation"`` of the pixels, drawn from the seed.
        angles: With rotations: counter-clockwise degrees, one angle a task. Default: evenly spaced from 0, below 180.
        disjoint_share: With ``"blurry"``: share of the classes that are in one task only, rounded.
        blurry_share: With ``"blurry"``: share of the other classes' training samples that are in other tasks.
        protocol: ``"standard"``, or ``"two-phase"`` for one half of the classes. Both halves have as many: of an odd
            number one class is in neither.
        phase: With ``"two-phase"``: ``"tune"`` or ``"evaluate"``.
        batch_size: Samples in a batch of one process.
        num_workers: Worker processes of each loader.
        seed: Seed of everything that is drawn: held-out samples, halves, class order, permutations, orders.
        validation_share: Share of each class held out, in (0, 1).

    Raises:
        ValueError: If a setting is out of range, does not go with the scenario or with the dataset.
    """

    def __init__(
        self,
        # Without its parameter: through Dataset[Any] jsonargparse sees no arguments of a class that a config names.
        dataset: str | Dataset | Callable[..., Dataset] = "digits",  # type: ignore[type-arg]
        dataset_args: dict[str, Any] | None = None,
        scenario: Literal["class", "task", "domain", "blurry"] = "class",
        tasks: int = 5,
        epochs_per_task: int = 1,
        class_order: list[int] | None = None,
        domain: Literal["rotation", "permutation"] = "rotation",
        angles: list[float] | None = None,
        disjoint_share: float = 0.5,
        blurry_share: float = 0.1,
        protocol: Literal["standard", "two-phase"] = "standard",
        phase: Literal["tune", "evaluate"] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        validation_share: float = 0.2,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, validation_share)
        for name, given in (("scenario", scenario), ("domain", domain), ("protocol", protocol)):
            if given not in _CHOICES[name]:
                raise ValueError(f"TaskStream: {name} must be one of {', '.join(_CHOICES[name])}, got {given!r}.")
        for name, number in (("tasks", tasks), ("epochs_per_task", epochs_per_task)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"TaskStream: {name} must be a whole number from 1 on, got {number!r}.")
        for name, share in (("disjoint_share", disjoint_share), ("blurry_share", blurry_share)):
            if not is_real(share) or not 0.0 <= share <= 1.0:
                raise ValueError(f"TaskStream: {name} must lie in [0, 1], got {share!r}.")
        _check_company(scenario, domain, protocol, tasks, class_order, angles, phase)
        self.dataset = dataset
        self.dataset_args = dataset_args
        self.scenario = scenario
        self.tasks = tasks
        self.epochs_per_task = epochs_per_task
        self.class_order = class_order
        self.domain = domain
        self.angles = [180.0 * task / tasks for task in range(tasks)] if angles is None else list(angles)
        self.disjoint_share = disjoint_share
        self.blurry_share = blurry_share
        self.protocol = protocol
        self.phase = phase
        self._plan: scenarios.Plan
        self._labels: list[int]
        self._chosen = ChosenTask()
        self._steps: dict[tuple[int, ...], list[int]] = {}

    @property
    def num_classes(self) -> int:
        """How many classes there are over all tasks, so how wide a head has to be."""
        return len(self.original_labels)

    @property
    def original_labels(self) -> list[int]:
        """The dataset's label of each class."""
        self._parts()
        return list(self._labels)

    @property
    def task_names(self) -> list[str]:
        """What each task is called; its classes are those of the dataset, as in ``original_labels``."""
        return list(self._planned().names)

    @property
    def task_classes(self) -> list[list[int]]:
        """The classes that each task is evaluated on, as batches have them: from 0."""
        return [list(classes) for classes in self._planned().classes]

    @property
    def task_incremental(self) -> bool:
        """Whether the task is known at evaluation, so that only its own classes compete."""
        return self.scenario == "task"

    @property
    def task_steps(self) -> list[int]:
        """Batches of the whole stream after which tasks 1, 2, ... begin, with as many processes as the Trainer has."""
        # Asked for with each batch by whatever goes by `current_task`: worked out once for each way of counting.
        key = (self.batch_size, self.epochs_per_task, *self._place())
        if key not in self._steps:
            self._steps[key] = list(accumulate(self._sampler(range(self.tasks)).batches))[:-1]
        return list(self._steps[key])

    @property
    def current_task(self) -> int:
        """The task of the batch that is trained on, between ``on_train_batch_start`` and ``on_train_batch_end``.

        Before the first batch of a fit it is the first task, later between batches that of the batch before.
        """
        trainer: Any = self.trainer
        if self._chosen.task is not None or trainer is None or trainer.overfit_batches > 0:
            return self._chosen.task or 0
        # The Trainer's count: loaders run ahead, and it is right after a resume. `current`, since a batch that failed
        # before a resume stays in the total.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.total.ready == self._chosen.ready:
            return 0
        return bisect_right(self.task_steps, progress.current.ready - 1)

    def start_task(self, task: int | None) -> None:
        """Give only this task to the fits from now on, from its first epoch; ``None`` the whole stream again.

        A fit that is running keeps its task. A fit that resumes from a checkpoint of the same task continues it.

        Raises:
            ValueError: If there is no such task.
        """
        if task is not None and (isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < self.tasks):
            raise ValueError(
                f"TaskStream.start_task({task!r}): the tasks are 0..{self.tasks - 1}, or None for the whole stream."
            )
        self._chosen.wanted, self._chosen.anew = task, True
        trainer: Any = self.trainer
        if trainer is None or (trainer.state.fn, trainer.state.status) != ("fit", "running"):
            self._chosen.take(trainer)
            self._chosen.anew = True  # also for the fit to come, whose Trainer may be another

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the data and plan the tasks, once for all stages."""
        super().setup(stage)
        if stage == "fit":
            self._chosen.take(self.trainer)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the task of a checkpoint, unless :meth:`start_task` has asked for another one."""
        trainer: Any = self.trainer
        if trainer is None or trainer.state.fn == "fit":
            self._chosen.restore(state_dict)
            if self._chosen.task is not None and self._chosen.task >= self.tasks:
                raise ValueError(
                    f"TaskStream: the checkpoint was in task {self._chosen.task} of a stream, this one has the tasks "
                    f"0..{self.tasks - 1}. Give the stream of the checkpoint, or say start_task(...) before the fit."
                )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return which task the fits train on, and since when."""
        return self._chosen.state_dict(self.trainer)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return this process's batches of the whole stream, or of the task that was started."""
        dataset = self._parts()[0]
        trainer: Any = self.trainer
        chosen = self._chosen.task
        if trainer is not None and trainer.overfit_batches > 0:
            # The host wants the same few batches in every epoch: those of one task.
            return self._ordered(Subset(dataset, self._plan.train[chosen or 0].tolist()))
        sampler = self._sampler(range(self.tasks) if chosen is None else [chosen])
        for task, batches in zip(sampler.tasks, sampler.batches, strict=True):
            if batches == 0:
                processes = sampler.num_replicas
                raise ValueError(
                    f"TaskStream: batch_size={self.batch_size} on {processes} process(es) needs "
                    f"{self.batch_size * processes} training samples in each task, task {task} "
                    f"({self._plan.names[task]}) has {len(self._plan.train[task])}. Lower batch_size, or give tasks "
                    "more data."
                )
        sources = {name: getattr(self, name) for name in _SOURCES}
        return ResumableLoader(
            dataset,
            sampler,
            self.batch_size,
            self.num_workers,
            trainer,
            begun=self._chosen.begun,
            settings={"task": -1 if chosen is None else chosen, "epochs_per_task": self.epochs_per_task},
            checksum=self._plan.checksum(),
            sources={**sources, "angles": self.angles if self._turns else None},
        )

    def task_dataloaders(self) -> list[DataLoader[Any]]:
        """Return the held-out samples of each task, in a fixed order; no two have a sample in common."""
        dataset = self._parts()[0]
        return [self._ordered(Subset(dataset, held_out.tolist())) for held_out in self._plan.held_out]

    @override
    def _load_splits(self) -> tuple[Dataset[Any], Dataset[Any]]:
        dataset = open_dataset(self.dataset, self.dataset_args)
        labels = read_labels(dataset)
        kept = torch.tensor(sorted(set(labels.tolist())), dtype=torch.int64)
        if self.protocol == "two-phase":
            kept = kept[scenarios.choose_half(len(kept), self.phase == "tune", self.seed)]
        if len(kept) == 0:
            raise ValueError("TaskStream(protocol='two-phase') needs two classes or more, the dataset has one.")
        self._labels = kept.tolist()
        places = torch.searchsorted(kept, labels).clamp(max=len(kept) - 1)
        classes = torch.where(kept[places] == labels, places, -1)
        self._plan = self._make_plan(classes)
        changes = self._changes() if self.scenario == "domain" else None
        stream = TaskDataset(dataset, classes, changes)
        for change in changes or []:
            change(dataset[0][0])
        return stream, Subset(stream, torch.cat(self._plan.held_out).tolist())

    @property
    def _turns(self) -> bool:
        """Whether tasks are rotations."""
        return (self.scenario, self.domain) == ("domain", "rotation")

    def _make_plan(self, classes: Tensor) -> scenarios.Plan:
        labels = self._labels
        train, held_out = scenarios.hold_out(classes, self.validation_share, self.seed, labels)
        if self.scenario == "domain":
            names = ["pixels as they are", *(f"permutation {task}" for task in range(1, self.tasks))]
            if self._turns:
                names = [f"rotation {angle:g}" for angle in self.angles]
            return scenarios.plan_domains(len(classes), train, held_out, names, len(labels))
        if self.scenario == "blurry":
            return scenarios.plan_blurry(
                classes, train, held_out, self.tasks, self.disjoint_share, self.blurry_share, self.seed, labels
            )
        return scenarios.plan_classes(classes, train, held_out, self.tasks, self.class_order, self.seed, labels)

    def _changes(self) -> list[Callable[[Any], Tensor]]:
        """Return what each task of a domain-incremental stream does to x."""
        if self.domain == "rotation":
            return [Rotation(angle) for angle in self.angles]
        keys = [None, *(scenarios.seed_of(self.seed, "permutation", task) for task in range(1, self.tasks))]
        return [Permutation(key) for key in keys]

    def _planned(self) -> scenarios.Plan:
        self._parts()
        return self._plan

    def _sampler(self, tasks: Iterable[int]) -> StreamSampler:
        dataset, _ = self._parts()
        samples = {task: self._plan.train[task] for task in tasks}
        return StreamSampler(dataset, samples, self.epochs_per_task, self.batch_size, self.seed, *self._place())


def _check_company(
    scenario: str,
    domain: str,
    protocol: str,
    tasks: int,
    class_order: list[int] | None,
    angles: list[float] | None,
    phase: str | None,
) -> None:
    """Raise ``ValueError`` for settings that do not go with each other."""
    if class_order is not None and scenario not in ("class", "task"):
        raise ValueError(f"TaskStream: class_order goes with scenario='class' or 'task', got scenario={scenario!r}.")
    if angles is not None and (scenario, domain) != ("domain", "rotation"):
        raise ValueError(
            f"TaskStream: angles go with scenario='domain' and domain='rotation', got scenario={scenario!r}, "
            f"domain={domain!r}."
        )
    if angles is not None and (not isinstance(angles, (list, tuple)) or not all(map(is_real, angles))):
        raise ValueError(f"TaskStream: angles must be a list of degrees, one for each task, got {angles!r}.")
    if angles is not None and len({angle % 360 for angle in angles}) != tasks:
        raise ValueError(f"TaskStream: angles must be {tasks} different ones, one for each task, got {angles!r}.")
    if protocol == "two-phase" and phase not in ("tune", "evaluate"):
        raise ValueError(f"TaskStream(protocol='two-phase') needs phase='tune' or 'evaluate', got phase={phase!r}.")
    if protocol == "standard" and phase is not None:
        raise ValueError(f"TaskStream(phase={phase!r}) goes with protocol='two-phase', got protocol='standard'.")
