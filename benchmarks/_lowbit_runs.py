"""One run of `lowbit_stability`: a small language model whose linear layers compute in few bits, and how it fares."""

import functools
import logging
import math
import time
import warnings
from typing import Any, NamedTuple

__all__ = ["BATCH", "BIN", "LENGTH", "MODEL", "RISE", "Job", "quantizers", "train"]

BATCH, LENGTH, VALIDATION_WINDOWS = 16, 64, 384
RISE = 20
# Steps whose losses and sharpnesses are averaged before they are looked at.
BIN = 10
MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}


class Job(NamedTuple):
    """One run of training.

    Attributes:
        format: A name that :func:`quantizers` knows.
        method: ``"AdamW"``, ``"AdamW, clipping"`` or ``"StableSPAM"``.
        seed: Of the initial weights, the order of the data and stochastic rounding.
        lr: Peak of the learning rate.
        steps: Optimizer steps.
    """

    format: str
    method: str
    seed: int
    lr: float
    steps: int


def quantizers(name: str) -> dict[str, Any]:
    """Return the quantizers of weights, activations and gradients of a format; none for ``"fp32"``."""
    from lightning_stable.functional.quantize import Quantizer

    if name == "fp32":
        return {}
    # As the paper: the low bits of the mantissa masked.
    forward = backward = Quantizer(name, rounding="truncate") if name[0] == "e" and "/" not in name else None
    if name == "e4m3/e5m2":
        forward, backward = Quantizer("e4m3", "tensor"), Quantizer("e5m2", "tensor")
    elif forward is None:
        scaling = {"int8": "row", "int4 group:128": "group:128"}.get(name, "none")
        forward = Quantizer(name.partition(" ")[0], scaling)
        # To the nearest, what is small in a group would always fall to zero, and the sum of many steps with it.
        backward = Quantizer(name.partition(" ")[0], scaling, "stochastic")
    return {"weights": forward, "activations": forward, "gradients": backward}


@functools.cache
def _data() -> tuple[Any, Any, float]:
    """Return training and held-out windows, and the loss of guessing by the frequencies of bytes, in nats."""
    import torch

    from lightning_stable.data.text import TextDataModule

    datamodule = TextDataModule(sequence_length=LENGTH, batch_size=1, seed=0, max_bytes=1_000_000)
    datamodule.setup("fit")
    parts = []
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        windows = loader.dataset
        parts.append(torch.stack([windows[index]["input_ids"] for index in range(len(windows))]))
    training, held = parts[0], parts[1][:: max(1, len(parts[1]) // VALIDATION_WINDOWS)][:VALIDATION_WINDOWS]
    counts = torch.bincount(training.flatten(), minlength=256).double() + 1
    guessing = -(counts / counts.sum()).log()[held[:, 1:]].mean()
    return training, held, float(guessing)


def train(job: Job) -> tuple[Job, dict[str, Any], float]:
    """Run a job; return it with its numbers and its seconds.

    The numbers are ``validation_loss`` in nats a byte, computed in the job's format (``None`` if it is not finite),
    ``guessing``, what guessing by the frequencies of bytes has, and for each :data:`BIN` steps the mean training
    ``losses`` and the mean ``sharpness`` of the last token's logits in percent.
    """
    # Imported here: the parent process only hands out jobs.
    import torch

    from lightning_stable.functional.simulated import convert
    from lightning_stable.recipes.causal_lm import CausalLM

    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree"):
        # transformers imports it, and it speaks of GPUs that are not there.
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    training, held, guessing = _data()
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    module = CausalLM(MODEL, lr=job.lr)
    if operands := quantizers(job.format):
        convert(module, exclude=["*head*"], **operands)
    records = _fit(job, module, training)
    with torch.no_grad():
        chunks = held.split(64)
        loss = sum(float(module(input_ids=c, labels=c).loss) * len(c) for c in chunks) / len(held)
    binned = [torch.tensor(values).split(BIN) for values in zip(*records, strict=True)]
    losses, sharpness = ([float(part.mean()) for part in parts] for parts in binned)
    found = {"validation_loss": loss if math.isfinite(loss) else None, "guessing": guessing}
    return job, {**found, "losses": losses, "sharpness": sharpness}, time.perf_counter() - started


def _fit(job: Job, module: Any, training: Any) -> list[tuple[float, float]]:
    """Train; return loss and sharpness of each step, up to the first that is not finite."""
    import torch

    from lightning_stable.functional.logit_sharpness import choose_positions, logit_sharpness
    from lightning_stable.functional.stable_spam import init_stable_spam, update_stable_spam

    parameters = list(module.parameters())
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["fused"] = True  # the same update, in a fraction of the time
    spam = init_stable_spam(len(parameters))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(job.seed))
    records = []
    for step in range(job.steps):
        for group in optimizer.param_groups:
            decay = 0.5 * (1.0 + math.cos(math.pi * step / job.steps))
            group["lr"] = job.lr * min(1.0, (step + 1) / RISE) * decay
        batch = training[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]]
        optimizer.zero_grad()
        output = module(input_ids=batch, labels=batch)
        output.loss.backward()
        logits, targets, _ = choose_positions(output.logits.detach(), batch, shift=True)
        records.append((float(output.loss), float(logit_sharpness(logits, targets).mean())))
        if not math.isfinite(records[-1][0]):
            break
        if job.method == "AdamW, clipping":
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        elif job.method == "StableSPAM":
            spam, _ = update_stable_spam([parameter.grad for parameter in parameters], spam)
        optimizer.step()
    return records
