"""DDP whose processes send compressed gradients: top-k, one bit an entry, low rank, or bfloat16.

Use it where the link between processes is what training waits for, and a step's gradient has to cross it: it keeps the
synchronous steps of DDP, and sends fewer bytes. Of DDP's bytes for float32 gradients and N processes, PowerSGD sends
about rank (rows + columns) / (rows columns) of each matrix, top-k the share N ratio (1/50 for two and 0.01), sign
N / 64 (1/32 for two) and bf16 a half. What a message leaves out is remembered by the process and made up for in later
steps; this memory is in the checkpoint, for each process its own, and a resumed run equals the uninterrupted one bit
for bit.
Do not use it within a machine or over a fast network: compressing costs time, and DDP hides its exchange behind the
backward pass.

Each process keeps copies of the gradients: one with EF, two with EF21, three with EControl, in float32 at least; one
with PowerSGD, in the gradients' precision.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.strategies import CompressedDDPStrategy
    >>> strategy = CompressedDDPStrategy(compressor="powersgd", rank=4)
    >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)  # doctest: +SKIP
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.functional.compression import ERRORS
from lightning_stable.strategies._ddp_settings import check_ddp_settings
from lightning_stable.strategies._rank_state import gather_rank_states, own_rank_state
from lightning_stable.strategies._roll_call import RollCall, name_the_missing, open_roll_call
from lightning_stable.strategies.hooks import compress_gradients
from lightning_stable.strategies.hooks._base import CompressionHook

__all__ = ["CompressedDDPStrategy"]

_COMPRESSORS = ("topk", "sign", "powersgd", "bf16")
# Which error feedback a compressor can have, its default first.
_ERRORS: dict[str, tuple[str, ...]] = {"topk": ("ef21", "econtrol", "ef"), "sign": ("ef21", "econtrol", "ef")}
_ERRORS |= {"powersgd": ("ef",), "bf16": ()}
# Whose memory is lost when the number of processes changes: the first words of the warning.
_OWNER = "CompressedDDPStrategy (what its messages left out)"


class CompressedDDPStrategy(DDPStrategy):
    """DDP with compressed gradients and error feedback.

    Args:
        compressor: What is sent of a gradient: "powersgd" (default), low-rank factors of each matrix (torch's hook);
            "topk", the largest entries of each tensor; "sign", one bit for each entry and one size for each tensor;
            "bf16", all of it in bfloat16 (torch's hook).
        ratio: For "topk": share of each tensor's entries that is sent, in (0, 1]; by default 0.01.
        error: For "topk" and "sign": how what was left out is made up for, "ef21" (default), "econtrol" or "ef".
            "powersgd" has "ef", and "bf16" nothing.
        eta: For "econtrol": weight of what was not sent yet in a message, in (0, 1]; by default 0.05.
        rank: For "powersgd": rank of the factors; by default 4.
        warmup_steps: So many steps first that are not compressed, with "powersgd" at least 2. EF21 and EControl begin
            from the gradients of the last one, or from zero.
        settings: What :class:`~lightning.pytorch.strategies.DDPStrategy` takes, without its communication hooks.

    Raises:
        ValueError: If a setting is not allowed, or not meant for this compressor.
    """

    def __init__(
        self,
        *,
        compressor: Literal["topk", "sign", "powersgd", "bf16"] = "powersgd",
        ratio: float | None = None,
        error: Literal["ef21", "econtrol", "ef"] | None = None,
        eta: float | None = None,
        rank: int | None = None,
        warmup_steps: int = 0,
        **settings: Any,
    ) -> None:
        _check(compressor, error, settings)
        super().__init__(**settings)
        self.compressor = compressor
        self.error: str | None = error or next(iter(_ERRORS[compressor]), None)
        self.ratio = _share("ratio", ratio, 0.01, compressor == "topk", "compressor='topk'")
        self.eta = _share("eta", eta, 0.05, self.error == "econtrol", "error='econtrol'")
        if rank is not None:
            check_count("rank", rank, 1, "columns")
            if compressor != "powersgd":
                raise ValueError(f"rank={rank!r} is for compressor='powersgd' only, not {compressor!r}. Leave it out.")
        self.rank = 4 if rank is None and compressor == "powersgd" else rank
        check_count("warmup_steps", warmup_steps, 0, "steps")
        self.warmup_steps = warmup_steps
        self._hook: CompressionHook | None = None
        self._roll_call: RollCall | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def bytes_sent(self) -> int:
        """Bytes of gradients that this process has sent since training began, resumed runs included.

        Counted as rings of N processes send them: (N - 1) messages for an all-gather, 2 (N - 1) / N of the buffer for
        an all-reduce.
        """
        return 0 if self._hook is None else self._hook.bytes_sent

    # ------------------------------------------------------------------------------------------- the host's hooks

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict=strict)
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            self._loaded = checkpoint.get(type(self).__name__, {})

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self._hook is not None:
            # Known now: the host makes the optimizers after it has wrapped the model.
            self._hook.streams_apart = not self._module.automatic_optimization and len(self.optimizers) > 1

    @override
    def configure_ddp(self) -> None:
        if self.error is not None and getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"CompressedDDPStrategy(compressor={self.compressor!r}) does not work with precision='16-mixed': its "
                "scaler multiplies gradients by a number that changes, and what is remembered of them would be in the "
                "old unit. Use 'bf16-mixed', or compressor='bf16', which remembers nothing."
            )
        super().configure_ddp()
        self._hook, loaded, self._loaded = None, self._loaded, None
        if self.world_size == 1:
            if loaded and loaded["error"] is not None:
                own_rank_state(loaded["ranks"], self.global_rank, self.world_size, _OWNER)  # warns of what is lost
            rank_zero_info("CompressedDDPStrategy: there is only one process, so there is nothing to send.")
            return
        self._hook = compress_gradients(
            cast(DistributedDataParallel, self.model),
            self.compressor,
            ratio=self.ratio or 1.0,
            error=self.error or "",
            eta=self.eta or 1.0,
            rank=self.rank or 1,
            warmup_steps=self.warmup_steps,
        )
        self._roll_call = open_roll_call(self)
        rank_zero_info(f"CompressedDDPStrategy: {self.world_size} processes, {self._words()}.")
        if loaded is not None:
            self._resume(self._hook, loaded)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._hook is not None:
            self._hook.begin_batch()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # Not with weights alone. And after a failure the other processes may never come to a gather.
        if self._hook is not None and "optimizer_states" in checkpoint and not self._module.trainer.interrupted:
            states = gather_rank_states(self._hook.own_state())
            if states is not None:
                checkpoint[type(self).__name__] = {
                    "compressor": self.compressor,
                    "error": self.error,
                    "rank": self.rank,
                    "shared": self._hook.shared_state(),
                    "ranks": states,
                }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        name_the_missing(type(self).__name__, self._roll_call, exception)

    @override
    def teardown(self) -> None:
        self._loaded = self._roll_call = None
        if self._hook is not None:
            self._hook.rest()  # kept, for a checkpoint after the fit
        super().teardown()

    # ------------------------------------------------------------------------------------------- private

    @property
    def _module(self) -> LightningModule:
        return cast(LightningModule, self.lightning_module)

    def _words(self) -> str:
        """Return what is sent, as the settings have it."""
        settings = ("compressor", "error", "ratio", "eta", "rank")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings if getattr(self, name) is not None)

    def _resume(self, hook: CompressionHook, saved: dict[str, Any]) -> None:
        """Take over what a checkpoint holds, or warn."""
        was, now = [(state.get("compressor"), state.get("error")) for state in (saved, vars(self))]
        if was != now:
            how = f"was made with compressor={was[0]!r} and error={was[1]!r}"
            if self.error is not None:
                rank_zero_warn(
                    f"CompressedDDPStrategy: the checkpoint {how if saved else 'holds no state of this strategy'}, and "
                    f"this run has compressor={now[0]!r} and error={now[1]!r}. What messages leave out is remembered "
                    "from now on only."
                )
            return
        shared = saved["shared"]
        if self.error is None:
            hook.load({}, shared)  # nothing that belongs to a process
            return
        own = own_rank_state(saved["ranks"], self.global_rank, self.world_size, _OWNER)
        if own is None:
            return
        if saved["rank"] != self.rank:
            rank_zero_warn(
                f"CompressedDDPStrategy: the checkpoint was made with rank={saved['rank']} and this run has rank="
                f"{self.rank}. PowerSGD's factors do not fit and begin anew. What messages left out is kept."
            )
            shared = {**shared, "factor": {}}
        hook.load(own, shared)


def _check(compressor: str, error: str | None, settings: dict[str, Any]) -> None:
    check_choice("compressor", compressor, _COMPRESSORS)
    if error is not None:
        check_choice("error", error, ERRORS)
        if error not in _ERRORS[compressor]:
            allowed = " or ".join(map(repr, _ERRORS[compressor])) or "none"
            raise ValueError(
                f"error={error!r} is not for compressor={compressor!r}, which has {allowed}. Leave it out."
            )
    check_ddp_settings("CompressedDDPStrategy", settings)
    if compressor == "powersgd" and settings.get("find_unused_parameters"):
        raise ValueError(
            "CompressedDDPStrategy(compressor='powersgd') does not work with find_unused_parameters=True: torch's "
            "PowerSGD loses what it remembers of a parameter that a step does not use. Choose 'topk', 'sign' or 'bf16'."
        )


def _share(name: str, value: float | None, default: float, meant: bool, where: str) -> float | None:
    """Return a setting in (0, 1], its default, or ``None`` where it has no meaning."""
    if value is None:
        return default if meant else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} is not in (0, 1]. By default it is {default}.")
    if not meant:
        raise ValueError(f"{name}={value!r} is for {where} only. Set that too, or leave {name} out.")
    return float(value)
