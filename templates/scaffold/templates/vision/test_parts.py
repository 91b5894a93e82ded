"""The data and the model, each for itself."""

import pytest
import torch

from {{ cookiecutter.package_name }}.data import VisionData
from {{ cookiecutter.package_name }}.model import VisionModule


@pytest.fixture(scope="module")
def data():
    data = VisionData(batch_size=8)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def batch(data):
    return next(iter(data.train_dataloader()))


def test_a_batch_is_what_the_model_takes(batch):
    inputs, labels = batch
    assert inputs.shape == (8, 1, 8, 8)
    assert 0 <= float(inputs.min()) <= float(inputs.max()) <= 1
    assert labels.dtype == torch.int64
    assert 0 <= int(labels.min()) <= int(labels.max()) < 10


def test_the_held_out_samples_are_no_training_samples(data):
    seen = {tuple(sample[0].flatten().tolist()) for sample in data.train}
    held_out = {tuple(sample[0].flatten().tolist()) for sample in data.held_out}
    assert held_out
    assert not seen & held_out


def loss_of(module, batch):
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(module(inputs), labels)


def test_the_model_gives_a_number_for_each_class(batch):
    assert VisionModule()(batch[0]).shape == (8, 10)


def test_a_step_lowers_the_loss_of_its_batch(batch):
    torch.manual_seed(0)
    module = VisionModule()
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(2):
        loss = loss_of(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
