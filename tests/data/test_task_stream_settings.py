"""A stream's settings: what is refused and how, how tasks are named, what the checkpoint of another stream is told."""

import re
import warnings

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from lightning_stable.data.digits import read_digits
from lightning_stable.data.task_stream import TaskStream


def make(**settings):
    return TaskStream(**{"tasks": 3, "batch_size": 120, "epochs_per_task": 2, **settings})


def labelled(labels):
    return TensorDataset(torch.zeros(len(labels), 1), torch.tensor(labels))


def make_labelled(classes=6, each=20):
    return labelled(list(range(classes)) * each)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": "32"}, "TaskStream: batch_size must be 1 or more samples, got '32'"),
        ({"blurry_share": "half"}, "blurry_share must lie in [0, 1], got 'half'"),
        ({"scenario": "domain", "angles": ["a", "b", "c"]}, "angles must be a list of degrees"),
        ({"scenario": "domain", "angles": 30}, "angles must be a list of degrees"),
        ({"dataset": "mnist"}, "imported: it has no module before a dot and no name after it. Give 'digits', a path"),
        (
            {"dataset": make_labelled, "dataset_args": {"m": 1}},
            "TaskStream(dataset_args={'m': 1}) does not fit dataset=make_labelled: got an unexpected keyword argument "
            "'m'. It is called as make_labelled(classes=6, each=20).",
        ),
        ({"dataset": labelled}, "does not fit dataset=labelled: missing a required argument: 'labels'"),
    ],
)
def test_what_does_not_fit_is_named_with_what_does(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**settings).setup()


def test_an_error_inside_the_function_of_a_dataset_stays_as_it_is():
    def fail(n=1):
        raise TypeError("a bug of the user")

    with pytest.raises(TypeError, match="a bug of the user"):
        make(dataset=fail).setup()


def test_tasks_are_named_by_the_labels_of_the_dataset():
    labels = labelled([1, 4, 7, 10] * 20)
    made = make(dataset=labels, tasks=2, class_order=[0, 1, 2, 3])
    assert made.task_names == ["classes 1, 4", "classes 7, 10"]
    assert made.task_classes == [[0, 1], [2, 3]]
    assert made.original_labels == [1, 4, 7, 10]
    assert make(dataset=labels, tasks=4, class_order=[3, 2, 1, 0]).task_names[0] == "class 10"
    blurry = make(dataset=labels, tasks=1, scenario="blurry", blurry_share=0.0)
    assert blurry.task_names == ["mostly classes 1, 4, 7, 10"]
    half = make(tasks=1, protocol="two-phase", phase="evaluate")
    assert half.task_names == [f"classes {', '.join(map(str, half.original_labels))}"]
    with pytest.raises(ValueError, match=r"class 10 has 1 sample\(s\)"):
        make(dataset=labelled([1, 4, 7] * 20 + [10])).setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scenario": "domain"},
            "samples 1797 -> 5391, scenario class -> domain, angles None -> [0.0, 60.0, 120.0]",
        ),
        ({"scenario": "task"}, None),  # the same batches
        ({"epochs_per_task": 3}, "epochs_per_task 2 -> 3"),
        ({"tasks": 2}, "tasks 3 -> 2"),
        ({"class_order": list(range(10))}, f"class_order None -> {list(range(10))}"),
        ({"dataset": Subset(read_digits(), list(reversed(range(1797))))}, "other samples or labels"),
    ],
    ids=["scenario", "same", "epochs", "tasks", "order", "data"],
)
def test_on_resume_the_settings_that_differ_are_named(settings, message):
    state = make().train_dataloader().state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(**settings).train_dataloader().load_state_dict(state)
    said = [re.search(r"not the one of the checkpoint \((.*)\), so", str(warning.message)) for warning in caught]
    assert [found and found[1] for found in said] == ([] if message is None else [message])


def test_the_steps_of_the_tasks_are_worked_out_once(monkeypatch):
    stream = make()
    calls = []
    sampler = stream._sampler
    monkeypatch.setattr(stream, "_sampler", lambda tasks: calls.append(tasks) or sampler(tasks))
    steps = stream.task_steps
    assert [stream.task_steps for _ in range(3)] == [steps] * 3
    stream.task_steps.clear()
    assert stream.task_steps == steps
    assert len(calls) == 1
    stream.batch_size *= 2  # as a tuner does
    assert stream.task_steps == make(batch_size=240).task_steps != steps
    monkeypatch.setattr(stream, "_place", lambda: (1, 2))
    assert stream.task_steps[0] < steps[0] // 2 + 1
    assert len(calls) == 3
