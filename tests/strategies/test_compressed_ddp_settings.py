"""CompressedDDPStrategy in one process, and what it refuses."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from strategies.compressed_settings import ALL

from lightning_stable.functional.compression import ERRORS
from lightning_stable.strategies import CompressedDDPStrategy
from lightning_stable.strategies.hooks import compress_gradients
from lightning_stable.testing.harness import QUIET, assert_same
from lightning_stable.testing.workers import Pair


def test_one_process_trains_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    weights = []
    strategies: list[Any] = ["auto", CompressedDDPStrategy(compressor="topk", start_method="popen")]
    for strategy in strategies:
        torch.manual_seed(0)
        module = BoringModel()
        Trainer(**QUIET, devices=1, strategy=strategy, max_steps=4).fit(module)
        weights.append(module.state_dict())
    torch.distributed.destroy_process_group()
    assert_same(weights[1], weights[0], "one process against plain training")
    assert strategies[1].bytes_sent == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compressor": "randomk"}, "compressor='randomk' is unknown"),
        ({"error": "ef22"}, "error='ef22' is unknown"),
        ({"error": "ef21"}, "not for compressor='powersgd', which has 'ef'"),
        ({"bucket_cap": 4}, "no setting called bucket_cap. Check the spelling"),
        ({"compressor": "bf16", "error": "ef"}, "error='ef' is not for compressor='bf16', which has none"),
        ({"compressor": "powersgd", "error": "ef21"}, "not for compressor='powersgd', which has 'ef'"),
        ({"ratio": 0.1}, "ratio=0.1 is for compressor='topk' only. Set that too"),
        ({"ratio": 0.0}, r"ratio=0.0 is not in \(0, 1\]"),
        ({"ratio": 1.1}, r"ratio=1.1 is not in \(0, 1\]"),
        ({"ratio": True}, "ratio=True is not in"),
        ({"ratio": "0.1"}, "ratio='0.1' is not in"),
        ({"ratio": math.nan}, "ratio=nan is not in"),
        ({"compressor": "sign", "ratio": 0.1}, "ratio=0.1 is for compressor='topk' only"),
        ({"eta": 0.1}, "eta=0.1 is for error='econtrol' only"),
        ({"compressor": "topk", "error": "econtrol", "eta": 2.0}, "eta=2.0 is not in"),
        ({"compressor": "topk", "rank": 4}, "rank=4 is for compressor='powersgd' only, not 'topk'"),
        ({"compressor": "powersgd", "rank": 0}, "rank=0 is not a whole number of columns from 1 on"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is not a whole number of steps from 0 on"),
        ({"ddp_comm_hook": print}, "cannot take ddp_comm_hook"),
        ({"model_averaging_period": 4}, "cannot take model_averaging_period"),
        ({"compressor": "powersgd", "find_unused_parameters": True}, "does not work with find_unused_parameters=True"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CompressedDDPStrategy(**arguments)


def test_defaults_are_those_of_the_compressor() -> None:
    assert CompressedDDPStrategy().compressor == "powersgd"
    found = {name: CompressedDDPStrategy(compressor=name) for name in ("topk", "sign", "powersgd", "bf16")}
    assert [strategy.error for strategy in found.values()] == ["ef21", "ef21", "ef", None]
    assert [strategy.ratio for strategy in found.values()] == [0.01, None, None, None]
    assert [strategy.rank for strategy in found.values()] == [None, None, 4, None]


@pytest.mark.parametrize(
    ("compressor", "kind", "words"),
    [
        ("topk", "scaled", "does not work with precision='16-mixed'"),
        ("bf16", "scaled", ""),
        ("powersgd", "scalar", "cannot take the parameter 'scale' of shape ()"),
        ("topk", "scalar", ""),
        ("topk", "empty", ""),
        ("sign", "empty", ""),
        ("powersgd", "empty", "cannot take the parameter 'nothing' of shape (0,)"),
        ("sign", "sparse", "cannot compress the sparse gradient of 'table.weight'"),
    ],
)
def test_bad_company(compressor: str, kind: str, words: str, workers: Pair) -> None:
    for text in workers.run("strategies.compressed_jobs:fit_special", compressor=compressor, kind=kind):
        assert words in text if words else not text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compressor": "randomk"}, "compressor='randomk' is unknown"),
        ({"compressor": "topk", "error": "ef22"}, "error='ef22' is unknown"),
        ({"compressor": "topk", "ratio": 0.0}, r"compress_gradients: ratio=0.0 is not in \(0, 1\]"),
        ({"compressor": "topk", "ratio": 2}, r"compress_gradients: ratio=2 is not in \(0, 1\]"),
        ({"compressor": "sign", "error": "econtrol", "eta": -1.0}, r"compress_gradients: eta=-1.0 is not in \(0, 1\]"),
        ({"compressor": "powersgd", "rank": 0}, "rank=0 is not a whole number of columns from 1 on"),
        ({"compressor": "bf16", "warmup_steps": -1}, "warmup_steps=-1 is not a whole number of passes from 0 on"),
    ],
)
def test_bad_settings_of_the_hook_alone(arguments: dict[str, Any], words: str) -> None:
    model: Any = None  # what is wrong is said before the model is looked at
    with pytest.raises(ValueError, match=words):
        compress_gradients(model, **arguments)


def test_every_combination_was_meant() -> None:
    """The pairs that this file tests are those that the constructor takes."""
    allowed = []
    for compressor, error in itertools.product(("topk", "sign", "powersgd", "bf16"), (*ERRORS, None)):
        try:
            CompressedDDPStrategy(compressor=compressor, error=error)
        except ValueError:
            continue
        allowed.append((compressor, error or CompressedDDPStrategy(compressor=compressor).error or ""))
    assert set(allowed) == set(ALL)
