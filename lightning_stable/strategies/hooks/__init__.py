"""DDP communication hooks that compress gradients, for DDP with and without a Trainer.

Unlike those of torch and of the host they keep their memory by parameter, so that it survives checkpoints and new
buckets, and they run on gloo and the CPU as on GPUs.
"""

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.functional.compression import ERRORS
from lightning_stable.strategies.hooks._base import CompressionHook, run_hook
from lightning_stable.strategies.hooks._bf16 import BFloat16Hook
from lightning_stable.strategies.hooks._error_feedback import ErrorFeedbackHook
from lightning_stable.strategies.hooks._messages import ScaledSign, TopK
from lightning_stable.strategies.hooks._powersgd import PowerSGDHook

__all__ = ["compress_gradients"]


def compress_gradients(
    model: DistributedDataParallel,
    compressor: str,
    *,
    ratio: float = 0.01,
    error: str = "ef21",
    eta: float = 0.05,
    rank: int = 4,
    warmup_steps: int = 0,
) -> CompressionHook:
    """Let DDP exchange compressed gradients, from its next backward pass on.

    The result's ``bytes_sent`` counts; ``own_state()``, which differs between processes, ``shared_state()`` and
    ``load(own, shared)`` serve checkpoints; call ``begin_batch()`` at each batch after setting ``streams_apart`` where
    several losses of a batch are for several optimizers.

    Args:
        model: The model, after DDP has wrapped it and before its first backward pass.
        compressor: "topk", "sign", "powersgd" or "bf16".
        ratio: Share of the entries that top-k sends, in (0, 1]. Without meaning for the others.
        error: Error feedback of top-k and sign: "ef", "ef21" or "econtrol". Without meaning for the others.
        eta: EControl's weight of what was not sent yet, in (0, 1].
        rank: Rank of PowerSGD's factors.
        warmup_steps: So many passes first that are not compressed.

    Raises:
        ValueError: If a setting that has a meaning for this compressor is not allowed, or PowerSGD cannot take a
            parameter.
    """
    _check(compressor, ratio, error, eta, rank)
    check_count("warmup_steps", warmup_steps, 0, "passes")
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    hook: CompressionHook
    if compressor in ("topk", "sign"):
        codec: Any = TopK(ratio) if compressor == "topk" else ScaledSign()
        hook = ErrorFeedbackHook(names, codec, error, eta if error == "econtrol" else 1.0, warmup_steps)
    elif compressor == "powersgd":
        hook = PowerSGDHook(names, rank, warmup_steps)
    else:
        hook = BFloat16Hook(names, warmup_steps)
    model.register_comm_hook(hook, run_hook)
    return hook


def _check(compressor: str, ratio: float, error: str, eta: float, rank: int) -> None:
    check_choice("compressor", compressor, ("topk", "sign", "powersgd", "bf16"))
    feedback = compressor in ("topk", "sign")
    if feedback:
        check_choice("error", error, ERRORS)
    for name, value, meant in (
        ("ratio", ratio, compressor == "topk"),
        ("eta", eta, feedback and error == "econtrol"),
    ):
        if meant and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1):
            raise ValueError(f"compress_gradients: {name}={value!r} is not in (0, 1].")
    if compressor == "powersgd":
        check_count("rank", rank, 1, "columns")
