"""The data and the model, each for itself."""

import pytest
import torch

from {{ cookiecutter.package_name }}.data import LanguageData, Windows
from {{ cookiecutter.package_name }}.model import LanguageModule


@pytest.fixture(scope="module")
def data():
    data = LanguageData(length=32, batch_size=8, max_bytes=200_000)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def batch(data):
    return next(iter(data.train_dataloader()))


def test_a_batch_is_what_the_model_takes(batch):
    assert batch["input_ids"].shape == batch["labels"].shape == (8, 32)
    assert batch["input_ids"].dtype == torch.int64
    assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < 256


def test_windows_follow_each_other():
    windows = Windows(bytes(range(10)), 4)
    assert [windows[index]["input_ids"].tolist() for index in range(len(windows))] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_too_little_text_is_an_error(tmp_path):
    (tmp_path / "short.py").write_text("pass")
    with pytest.raises(ValueError, match="too little text"):
        LanguageData(folder=str(tmp_path)).setup("fit")


def loss_of(module, batch):
    return module(**batch).loss


def test_the_model_gives_a_number_for_each_token(batch):
    assert LanguageModule()(**batch).logits.shape == (8, 32, 256)


def test_a_step_lowers_the_loss_of_its_batch(batch):
    torch.manual_seed(0)
    module = LanguageModule()
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(2):
        loss = loss_of(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
