"""Adapters in two processes: every rank gives data, all end bit-equal, and that is what one process would have."""

import os
from typing import Any

import pytest
import torch
from adapter_runs import INITS, Net, Samples, adapters, outputs
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_stable.peft import load_adapters
from lightning_stable.testing.harness import QUIET
from lightning_stable.testing.workers import Pair


class AtStart(Callback):
    """Keeps the weights when training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


class Skips(Net):
    """Has no loss on the second process."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.global_rank else super().training_step(batch, batch_idx)


def own_batches(rank: int, size: int) -> DataLoader[Any]:
    """Return the batches of one of the processes: every so many-th sample, as the host hands them out."""
    data = Samples("mlp")
    return DataLoader([data[index] for index in range(rank, len(data), size)], batch_size=4)


def train(
    init: str, path: str, strategy: str = "ddp", resume: bool = False, other_base: bool = False, residual: str = ""
) -> dict[str, Any]:
    """Train on one of the processes, each in another state of the random numbers."""
    rank = int(os.environ["RANK"])
    module, start = Net(), AtStart()
    if rank and other_base:
        with torch.no_grad():
            module.model.first.weight.add_(1.0)
    torch.manual_seed(100 + rank)
    chosen: Any = strategy
    options = {"quantize_residual": residual, "rounds": 2} if residual else {}
    if strategy == "local_sgd":
        from lightning_stable.strategies.local_sgd import LocalSGDStrategy

        chosen = LocalSGDStrategy(local_steps=2)
    trainer = Trainer(
        max_steps=6 if resume else 4,
        strategy=chosen,
        devices=2,
        callbacks=[adapters(init, trainable=["head.*"], init_options=options), start],
        **QUIET,
    )
    trainer.fit(module, own_batches(rank, 2), ckpt_path=path if resume else None)
    if not resume:
        trainer.save_checkpoint(path)
    return {"start": start.state, "end": module.state_dict(), "outputs": outputs(module, "mlp")}


def fail(init: str) -> str:
    """Return the error that a process gets if only the second one has no loss."""
    trainer = Trainer(max_steps=1, strategy="ddp", devices=2, callbacks=[adapters(init)], **QUIET)
    try:
        trainer.fit(Skips(), own_batches(int(os.environ["RANK"]), 2))
    except ValueError as error:
        return str(error)
    return "no error"


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("init", INITS)
def test_ranks_are_bit_equal_and_one_checkpoint_serves_both(workers: Pair, tmp_path: Any, init: str) -> None:
    path = str(tmp_path / "two.ckpt")
    first, second = workers.run("test_adapters_ddp:train", init=init, path=path)
    assert_equal(first["start"], second["start"])
    # Buffers of batch normalisation are each process's own until the next forward pass of DDP.
    for each in (first, second):
        each["end"] = {name: value for name, value in each["end"].items() if ".norm.running" not in name}
    assert_equal(first["end"], second["end"])
    assert torch.equal(outputs(load_adapters(Net(), path), "mlp"), first["outputs"])


@pytest.mark.parametrize("strategy", ["ddp", "local_sgd"])
def test_bases_in_four_bits_are_those_of_the_first_process(workers: Pair, tmp_path: Any, strategy: str) -> None:
    path = str(tmp_path / "two.ckpt")
    job: dict[str, Any] = {"init": "pissa", "path": path, "strategy": strategy, "residual": "nf4"}
    first, second = workers.run("test_adapters_ddp:train", **job, other_base=strategy == "ddp")
    assert_equal(first["start"], second["start"])
    assert first["start"]["model.first.base_layer.weight"].dtype == torch.uint8
    assert torch.equal(outputs(load_adapters(Net(), path), "mlp"), first["outputs"])
    resumed = workers.run("test_adapters_ddp:train", **job, resume=True)
    assert_equal(resumed[0]["start"], resumed[1]["start"])
    for name in ("model.first.base_layer.weight", "model.second.base_layer.scales"):
        assert torch.equal(resumed[0]["end"][name], first["start"][name])


@pytest.mark.parametrize("init", ["lora_ga", "eva", "corda"])
def test_all_data_counts_as_in_one_process(workers: Pair, tmp_path: Any, init: str) -> None:
    first, _ = workers.run("test_adapters_ddp:train", init=init, path=str(tmp_path / "two.ckpt"))
    twin, start = Net(), AtStart()
    batches = [batch for pair in zip(own_batches(0, 2), own_batches(1, 2), strict=True) for batch in pair]

    class Given:
        def __iter__(self) -> Any:
            return iter(batches)

    callback = adapters(init, init_batches=6, trainable=["head.*"])
    Trainer(max_steps=1, callbacks=[callback, start], **QUIET).fit(twin, Given())
    # The gradient of the second layer has one direction only, since the head has one output.
    for layer in ("first",) if init == "lora_ga" else ("first", "second"):
        name = f"model.{layer}.lora_A.default.weight"
        ours, expected = first["start"][name], start.state[name]
        # The same directions; those of incremental components only nearly.
        near = torch.linalg.svdvals(torch.linalg.qr(ours.T).Q.T @ torch.linalg.qr(expected.T).Q)
        assert ours.shape == expected.shape
        assert near.min() > (0.9 if init == "eva" else 0.999), (layer, near)


def test_another_base_on_the_second_process_does_not_count(workers: Pair, tmp_path: Any) -> None:
    path = str(tmp_path / "two.ckpt")
    expected, _ = workers.run("test_adapters_ddp:train", init="lora_ga", path=path)
    first, second = workers.run("test_adapters_ddp:train", init="lora_ga", path=path, other_base=True)
    assert_equal(first["start"], second["start"])
    assert_equal(first["start"], expected["start"])


def test_it_resumes_without_data_and_goes_with_local_updates(workers: Pair, tmp_path: Any) -> None:
    path = str(tmp_path / "four.ckpt")
    workers.run("test_adapters_ddp:train", init="eva", path=path)
    first, second = workers.run("test_adapters_ddp:train", init="eva", path=path, resume=True)
    assert_equal(first["start"], second["start"])
    local = workers.run("test_adapters_ddp:train", init="pissa", path=path, strategy="local_sgd")
    assert_equal(local[0]["start"], local[1]["start"])
    again = workers.run("test_adapters_ddp:train", init="pissa", path=path, strategy="local_sgd", resume=True)
    assert_equal(again[0]["start"], again[1]["start"])


@pytest.mark.parametrize("init", ["lora_ga", "eva"])
def test_a_failure_on_one_process_is_one_on_both(workers: Pair, init: str) -> None:
    first, second = workers.run("test_adapters_ddp:fail", init=init)
    assert "rank 1" in first
    assert "returned no loss for batch 0" in first
    assert "returned no loss for batch 0" in second
