"""What the two workers of ``co2_overlap.py`` run: fits of the small language model, and one bare all-reduce.

A job runs in a worker of :mod:`_pair`. Every fit is a real ``Trainer.fit`` with ``num_nodes=2, devices=1``.
"""

import functools
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.utils.data import DataLoader, RandomSampler
from typing_extensions import override

from lightning_stable.data.text import TextDataModule
from lightning_stable.recipes.causal_lm import CausalLM
from lightning_stable.strategies import CO2Strategy, DiLoCoStrategy, LocalSGDStrategy

__all__ = ["fit", "start", "transfer"]

LENGTH = 128
_PROBE = 3  # the step after which weights are compared: within a round


class Unwrapped(DDPStrategy):
    """The host's strategy with gradients kept local: what a local method on the stock strategy starts from."""

    @override
    def configure_ddp(self) -> None:
        pass


class Recorder(Callback):
    """Writes down when each step ended, what the link carried by then, and the weights of one step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.sent: list[int] = []
        self.weights = 0.0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        self.sent.append(_bytes_sent())
        if len(self.ends) == _PROBE:
            self.weights = sum(float(parameter.detach().double().sum()) for parameter in pl_module.parameters())


class Stall(Callback):
    """Sleeps before some steps.

    Args:
        seconds: How long.
        first: The first step with a stall.
        every: A stall each so many steps.
    """

    def __init__(self, seconds: float, first: int, every: int) -> None:
        self.seconds, self.first, self.every = seconds, first, every

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every == self.first:
            time.sleep(self.seconds)


def start() -> dict[str, Any]:
    """Make ready: one thread, the group of both workers, the text. Return the model's size and the peers there are."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        rank=int(os.environ["NODE_RANK"]),
        world_size=2,
    )
    _text()
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "parameters": sum(parameter.numel() for parameter in CausalLM().parameters()),
        "congestion_control": congestion.read_text().strip() if congestion.exists() else None,
        "torchft": _torchft_problem(),
    }


def transfer(numel: int, repeats: int) -> list[float]:
    """Return the seconds of single all-reduces of a float32 buffer, the first one left out."""
    buffer, taken = torch.zeros(numel), []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(buffer)
        taken.append(time.perf_counter() - began)
    return taken[1:]


def fit(
    method: str, tau: int, steps: int, batch: int, stalls: dict[str, Any] | None = None, quick: bool = False
) -> dict[str, Any]:
    """Train for some steps and return when each ended.

    Args:
        method: A name of ``_METHODS``, or one that begins with ``torchft``.
        tau: Steps of a round.
        steps: Optimizer steps.
        batch: Sequences a worker takes for a step.
        stalls: ``seconds`` and ``who``: ``"one"`` (worker 1 before every step) or ``"turns"`` (both, alternating).
        quick: Take the smallest model that there is.
    """
    rank = int(os.environ["NODE_RANK"])
    seed_everything(0, verbose=False)
    module = CausalLM(_tiny() if quick else None)
    # Samples of its own for each worker: the host sets the global seed anew, the same on both.
    own = torch.Generator().manual_seed(1 + rank)
    drawn = RandomSampler(_text(), replacement=True, num_samples=batch * (steps + 1), generator=own)
    recorder = Recorder()
    callbacks: list[Callback] = [recorder]
    if stalls and not (stalls["who"] == "one" and rank == 0):
        callbacks.append(Stall(stalls["seconds"], *((0, 1) if stalls["who"] == "one" else (rank, 2))))
    settings: dict[str, Any] = {"strategy": "auto"}
    if method.startswith("torchft"):
        from _overlap_torchft import TorchftDiLoCo

        callbacks.append(TorchftDiLoCo(tau, delay=tau // 4 if "delay" in method else 0))
    elif method in _METHODS:
        settings = {"strategy": _METHODS[method](tau), "num_nodes": 2}
    dist.barrier()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, DataLoader(_text(), batch_size=batch, sampler=drawn))
    dist.barrier()
    return {"ends": recorder.ends, "sent": recorder.sent, "weights": recorder.weights}


def _post_local_sgd(tau: int) -> Strategy:
    return DDPStrategy(
        process_group_backend="gloo",
        ddp_comm_state=PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=0),
        ddp_comm_hook=post_localSGD_hook,
        model_averaging_period=tau,
    )


_METHODS = {
    "DDP": lambda tau: DDPStrategy(process_group_backend="gloo"),
    "host's post-local SGD": _post_local_sgd,
    "host's loop, local": lambda tau: Unwrapped(process_group_backend="gloo"),
    "LocalSGD": lambda tau: LocalSGDStrategy(local_steps=tau),
    "DiLoCo": lambda tau: DiLoCoStrategy(local_steps=tau),
    "CO2": lambda tau: CO2Strategy(local_steps=tau),
}


@functools.cache
def _text() -> Any:
    data = TextDataModule(sequence_length=LENGTH, max_bytes=2_000_000)
    data.setup("fit")
    return data.train_dataloader().dataset


def _tiny() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": "llama", "vocab_size": 256, "num_key_value_heads": 2, **sizes}


def _bytes_sent() -> int:
    """Return what this end of the link sent so far, zero on the loopback, which all processes share."""
    device = os.environ["WORKER_DEVICE"]
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text()) if device else 0


def _torchft_problem() -> str | None:
    try:
        import torchft  # noqa: F401
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
