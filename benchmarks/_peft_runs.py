"""What `peft_convergence` runs: the pretraining of its small language model, and one fine-tuning of it."""

import functools
import itertools
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _peft_text import texts
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_stable.data.text import ByteWindows
from lightning_stable.peft.adapters import Adapters
from lightning_stable.recipes.causal_lm import DEFAULT_CONFIG, CausalLM

__all__ = ["LENGTH", "METHODS", "Job", "Sizes", "pretrain", "train"]

LENGTH, RANK = 128, 8
INIT_BATCHES = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The setting of Adapters; None where there is something else than ours.
METHODS: dict[str, str | None] = {
    "LoRA": "default",
    "PiSSA": "pissa",
    "LoRA-GA": "lora_ga",
    "LoRA-GA of peft": None,
    "EVA": "eva",
    "OLoRA": "olora",
    "LoLDU": "loldu",
    "SVFit": "svfit",
    "full": None,
}


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
        width: Of the model.
        layers: Of the model.
        max_bytes: Of source files to read.
        pretraining_steps: Optimizer steps on code.
        pretraining_batch: Windows in each.
        steps: Optimizer steps on prose.
        batch: Windows in each.
        every: Steps between evaluations.
        windows: Windows of each held-out part.
    """

    width: int
    layers: int
    max_bytes: int
    pretraining_steps: int
    pretraining_batch: int
    steps: int
    batch: int
    every: int
    windows: int


class Job(NamedTuple):
    """One fine-tuning.

    Attributes:
        method: A name of :data:`METHODS`.
        seed: Of the adapters and of the order of the data.
        lr: Peak of the learning rate.
        folder: What :func:`pretrain` wrote.
        sizes: The sizes.
    """

    method: str
    seed: int
    lr: float
    folder: Path
    sizes: Sizes


class Rate(Callback):
    """Lets the learning rate rise over some steps, and fall by a cosine to zero."""

    def __init__(self, rise: int, steps: int) -> None:
        self.rise, self.steps = rise, steps

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        share = min(1.0, (step + 1) / self.rise) * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share


class Curve(Callback):
    """Takes the validation loss before training and every few steps."""

    def __init__(self, held: Tensor, every: int) -> None:
        self.held, self.every = held, every
        self.losses: dict[int, float] = {}
        self.trained = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.losses[0] = loss_on(pl_module, self.held)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.losses[trainer.global_step] = loss_on(pl_module, self.held)


def pretrain(folder: Path, sizes: Sizes, threads: int) -> float:
    """Train the model on code, and write it and all texts into a folder; return its loss on prose."""
    _quiet()
    torch.set_num_threads(threads)
    seed_everything(0, verbose=False)
    text = texts(sizes.max_bytes)
    parts = {name: _spread(getattr(text, name), sizes.windows) for name in ("tuning", "validation")}
    torch.save({**parts, "prose": text.prose}, folder / "prose.pt")
    shape = {"hidden_size": sizes.width, "intermediate_size": 3 * sizes.width, "num_hidden_layers": sizes.layers}
    module = CausalLM({**DEFAULT_CONFIG, **shape}, lr=3e-3)
    _fit(module, ByteWindows(text.code, LENGTH), sizes.pretraining_batch, sizes.pretraining_steps, [])
    module.model.save_pretrained(folder)  # type: ignore[operator] # of transformers
    return loss_on(module, parts["validation"])


def train(job: Job) -> tuple[Job, dict[str, Any], float]:
    """Run a job with one thread; return it with its numbers and its seconds.

    The numbers are ``losses`` by step and ``tuning``, the loss on the other held-out part, in nats a byte, and
    ``trained``, how many parameters train.
    """
    _quiet()
    torch.set_num_threads(1)
    began = time.perf_counter()
    text = _prose(job.folder)
    seed_everything(job.seed, verbose=False)
    module = CausalLM(pretrained=str(job.folder), lr=job.lr, weight_decay=0.0)
    windows, curve = ByteWindows(text["prose"], LENGTH), Curve(text["validation"], job.sizes.every)
    if job.method == "LoRA-GA of peft":
        _lora_ga_of_peft(module, itertools.islice(_loader(windows, job.sizes.batch, job.seed), INIT_BATCHES))
    callbacks = [*_adapters(job.method, job.seed), curve]
    _fit(module, windows, job.sizes.batch, job.sizes.steps, callbacks, job.seed)
    numbers = {"losses": curve.losses, "tuning": loss_on(module, text["tuning"]), "trained": curve.trained}
    return job, numbers, time.perf_counter() - began


def loss_on(module: LightningModule, windows: Tensor) -> float:
    """Return the mean loss on windows, in nats a byte."""
    module.eval()
    with torch.no_grad():
        chunks = windows.split(32)
        total = sum(float(module(input_ids=chunk, labels=chunk).loss) * len(chunk) for chunk in chunks)
    module.train()
    return total / len(windows)


def _adapters(method: str, seed: int) -> list[Callback]:
    init = METHODS[method]
    if init is None:
        return []
    config = {"r": RANK, "target_modules": TARGETS}
    if init == "loldu":
        config["alpha"] = RANK
    elif init != "svfit":
        config["lora_alpha"] = RANK
    return [Adapters(config, init=init, init_batches=INIT_BATCHES, seed=seed)]


def _lora_ga_of_peft(module: CausalLM, batches: Any) -> None:
    """Start adapters by peft's LoRA-GA, from the batches that ours starts from."""
    from peft import LoraConfig, LoraGAConfig, inject_adapter_in_model
    from peft.tuners.lora.loraga import preprocess_loraga

    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",  # type: ignore[arg-type] # one of the texts it takes
        lora_ga_config=LoraGAConfig(),
    )

    def train_step() -> None:
        for batch in batches:
            module(**batch).loss.backward()

    preprocess_loraga(module.model, config, train_step)
    inject_adapter_in_model(config, module.model)


def _fit(
    module: LightningModule, windows: ByteWindows, batch: int, steps: int, callbacks: list[Callback], seed: int = 0
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[*callbacks, Rate(max(1, steps // 25), steps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _loader(windows, batch, seed))


def _loader(windows: ByteWindows, batch: int, seed: int) -> DataLoader[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(windows, batch_size=batch, shuffle=True, drop_last=True, generator=generator)


def _spread(text: bytes, count: int) -> Tensor:
    """Return windows from all over a text."""
    windows = ByteWindows(text, LENGTH)
    step = max(1, len(windows) // count)
    return torch.stack([windows[index]["input_ids"] for index in range(0, len(windows), step)][:count])


@functools.cache
def _prose(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "prose.pt", weights_only=True)
    return found


def _quiet() -> None:
    """Keep libraries from speaking of GPUs that are not there, of loaders without workers, and of their progress."""
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
