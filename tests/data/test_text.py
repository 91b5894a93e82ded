import sysconfig
import time
from pathlib import Path

import pytest
import torch

from lightning_stable.data.text import ByteWindows, TextDataModule


@pytest.fixture
def corpus(tmp_path):
    """Twenty files whose bytes are all their own number, two of them in a folder called test."""
    for number in range(1, 21):
        folder = tmp_path / ("test" if number > 18 else f"part{number % 3}")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.py").write_bytes(bytes([number]) * (100 + number))
    (tmp_path / "notes.txt").write_bytes(b"not this one" * 100)
    (tmp_path / "empty.py").write_bytes(b"")
    return tmp_path


def numbers(windows):
    return set(windows.data.tolist()) - {0}


def splits(datamodule):
    datamodule.setup("fit")
    return datamodule.train_dataloader().dataset, datamodule.val_dataloader().dataset


def test_windows_follow_each_other_and_leave_out_the_rest():
    windows = ByteWindows(b"abcdefgh", 3)
    assert len(windows) == 2
    assert [bytes(windows[index]["input_ids"].tolist()) for index in range(2)] == [b"abc", b"def"]
    assert torch.equal(windows[1]["input_ids"], windows[1]["labels"])
    assert windows[1]["labels"].dtype is torch.int64
    assert len(ByteWindows(b"", 3)) == 0


def test_no_file_is_on_both_sides_and_none_is_lost(corpus):
    train, validation = splits(TextDataModule(str(corpus), sequence_length=8, batch_size=2, validation_share=0.2))
    assert numbers(train) | numbers(validation) == set(range(1, 21))
    assert not numbers(train) & numbers(validation)
    total = len(train.data) + len(validation.data)
    assert 0.2 <= len(validation.data) / total < 0.2 + 121 / total
    # One zero byte between two files, none at the ends.
    assert (train.data == 0).sum() == len(numbers(train)) - 1


def test_the_split_follows_the_seed_and_the_names_only(corpus, tmp_path_factory):
    def held_out(root, seed=0):
        datamodule = TextDataModule(str(root), sequence_length=8, batch_size=2, validation_share=0.3, seed=seed)
        datamodule.setup("fit")
        return [file.relative_to(root) for file in datamodule.validation_files]

    copy = tmp_path_factory.mktemp("elsewhere")
    for file in sorted(corpus.rglob("*.*"), reverse=True):  # made in another order
        target = copy / file.relative_to(corpus)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    assert held_out(corpus) == held_out(copy)
    assert held_out(corpus) != held_out(corpus, seed=1)


def test_a_file_named_twice_is_read_once(corpus):
    paths = [str(corpus), str(corpus / "part1" / "1.py"), str(corpus / "part1" / ".." / "part1")]
    datamodule = TextDataModule(paths, sequence_length=8, batch_size=2)
    datamodule.setup("fit")
    assert len(datamodule.train_files + datamodule.validation_files) == 20


def test_files_given_by_name_need_no_pattern(corpus):
    paths = [str(corpus / "notes.txt"), str(corpus / "part1" / "1.py")]
    datamodule = TextDataModule(paths, sequence_length=8, batch_size=2)
    datamodule.setup("fit")
    assert len(datamodule.train_files + datamodule.validation_files) == 2


def test_max_bytes_limits_what_is_read(corpus):
    train, validation = splits(TextDataModule(str(corpus), sequence_length=8, batch_size=2, max_bytes=700))
    read = int((train.data != 0).sum() + (validation.data != 0).sum())
    assert 580 < read <= 700


def test_the_default_is_the_standard_library_without_its_tests():
    datamodule = TextDataModule()
    start = time.perf_counter()
    train, validation = splits(datamodule)
    assert time.perf_counter() - start < 5  # about 0.2 s on an idle machine
    files = datamodule.train_files + datamodule.validation_files
    root = Path(sysconfig.get_path("stdlib"))
    inside = {str(file.relative_to(root)) for file in files}
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= inside
    assert not [name for name in inside if "site-packages" in name or "/test" in name or name.startswith("test")]
    assert len(train.data) > 5e6
    assert 0.05 <= len(validation.data) / (len(train.data) + len(validation.data)) < 0.1
    assert b"import" in bytes(validation.data[:100_000].tolist())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_fit_causal_language_models(num_workers):
    datamodule = TextDataModule(batch_size=4, sequence_length=32, max_bytes=300_000, num_workers=num_workers)
    batch = next(iter(datamodule.train_dataloader()))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (4, 32)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].max() < datamodule.vocabulary_size
    assert len(list(datamodule.test_dataloader())) == len(datamodule.val_dataloader())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sequence_length": 1}, ValueError, "sequence_length must be 2 or more bytes.* got 1"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be 1 or more, or None.* got 0"),
        ({"paths": "no/such/place"}, FileNotFoundError, "'no/such/place', which does not exist"),
        ({"pattern": "*.rs"}, ValueError, r"0 of the 0 file\(s\) found .* pattern='\*.rs'"),
        ({"max_bytes": 150}, ValueError, r"1 of the 21 file\(s\) found .* max_bytes=150"),
        ({"sequence_length": 1000}, ValueError, r"The validation part has \d+ bytes .* sequence_length=1000"),
    ],
)
def test_bad_settings_are_named(corpus, settings, error, message):
    with pytest.raises(error, match=message):
        TextDataModule(**{"paths": str(corpus), "batch_size": 1, **settings}).setup("fit")
