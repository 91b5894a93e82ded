"""Adapters of PEFT in any LightningModule, started right and kept in small checkpoints.

Use it to fine-tune a large model by a small number of new parameters: low-rank adapters that start from the weights
(PiSSA, OLoRA), from gradients (LoRA-GA) or from the layers' inputs (EVA), and other methods of PEFT. Not for weights
that are sharded over processes. Cost: what the start takes, told at the end of set-up; in training that of adapters.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.peft import Adapters
    >>> adapters = Adapters({"r": 4, "target_modules": ["q_proj", "v_proj"]}, init="pissa")
    >>> trainer = Trainer(callbacks=[adapters], logger=False, enable_checkpointing=False)
"""

import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.peft._adapt import Wish, adapt, convert_first, keeps_half
from lightning_stable.peft._checkpoint import (
    check_optimizers,
    complete,
    differences,
    reduce_checkpoint,
    restore,
    stored_record,
    take_base,
)
from lightning_stable.peft._config import build_config
from lightning_stable.peft._data_pass import Loss
from lightning_stable.peft._inject import merge
from lightning_stable.peft._options import check_options
from lightning_stable.peft._record import KEY, Record, find_record
from lightning_stable.peft._targets import find_model

__all__ = ["Adapters"]


class Adapters(Callback):
    """Put adapters into a module before its optimizers are made, freeze the rest, and keep checkpoints small.

    Adapters come after ``setup``, ``configure_model`` and a checkpoint's weights, and before the strategy wraps the
    module. A module that has them already is left as it is. Validation, testing and prediction with a checkpoint of
    adapters work likewise; without one the module stays plain there.

    Args:
        config: A PEFT config, or its fields as a dict: ``r``, ``lora_alpha``, ``target_modules`` ... ``peft_type`` says
            which method, low-rank adapters by default.
        init: How adapters start: ``"default"`` (as the PEFT method has it), ``"gaussian"``, ``"orthogonal"``,
            ``"mica"``, ``"olora"``, ``"pissa"``, ``"lora_ga"``, ``"eva"``, ``"corda"``; ``"loldu"`` and ``"svfit"`` are
            methods of their own.
        model: Path of the submodule that gets adapters; ``None`` for the whole module.
        init_batches: Training batches on each process that ``"lora_ga"``, ``"eva"`` and ``"corda"`` start from.
        save: ``"adapter"``: checkpoints hold what trains, buffers, and what rebuilds the rest from the untouched base;
            ``"full"``: all weights.
        merge_on_end: After the last checkpoint of a fit add the adapters to the base, which is then a plain module.
        seed: Of what is drawn at the start; each layer has numbers of its own, whatever else the run draws.
        trainable: Patterns of names of parameters that train beside the adapters, such as ``"head.*"``.
        init_options: Settings of the initialiser, see its card.
        init_mode: ``"eval"``: batches for the start run without dropout; ``"train"``: as the module is.
        init_loss: Dotted path of a function of module and batch that returns the loss for the start, in place of
            ``training_step``.

    Raises:
        ValueError: At construction for a setting out of range or a config that contradicts ``init``. When a run begins:
            for layers that cannot be adapted right, a base or config that is not the checkpoint's, or no training data
            to start from.
    """

    def __init__(
        self,
        config: Any,
        init: str = "default",
        model: str | None = "model",
        init_batches: int = 8,
        save: str = "adapter",
        merge_on_end: bool = False,
        seed: int = 0,
        trainable: Sequence[str] = (),
        init_options: dict[str, Any] | None = None,
        init_mode: str = "eval",
        init_loss: str | None = None,
    ) -> None:
        check_choice("save", save, ("adapter", "full"))
        check_choice("init_mode", init_mode, ("eval", "train"))
        check_count("init_batches", init_batches, 1, "batches")
        check_count("seed", seed, 0, "seeds")
        if isinstance(trainable, str):
            raise ValueError(f"trainable={trainable!r} is one text. Give a list of patterns: [{trainable!r}].")  # noqa: TRY004
        owner = type(self).__name__
        built = build_config(owner, config, init)
        check_options(owner, init, init_options or {})
        self.save = save
        self.merge_on_end = merge_on_end
        self._wish = Wish(
            owner=owner,
            config=built,
            init=init,
            model=model,
            trainable=tuple(trainable),
            options=dict(init_options or {}),
            seed=seed,
            batches=init_batches,
            evaluate=init_mode == "eval",
            loss=_named_loss(owner, init_loss),
        )
        self._wraps: list[MethodWrap] = []
        self._adapted: weakref.WeakSet[LightningModule] = weakref.WeakSet()

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._refuse_company(trainer)
        self._undo_wraps()

        def load(original: Callable[..., None], checkpoint: dict[str, Any]) -> None:
            self._prepare_load(trainer, pl_module, checkpoint)
            original(checkpoint)

        def save(original: Callable[..., None], checkpoint: dict[str, Any]) -> None:
            original(checkpoint)
            self._reduce(trainer, pl_module, checkpoint)

        def begin(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            self._begin(trainer, pl_module)
            original(*args, **kwargs)
            if trainer.state.fn == TrainerFn.FITTING and find_record(pl_module) is not None:
                check_optimizers(self._wish.owner, pl_module, trainer.optimizers)

        def fail(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            self._undo_wraps()

        self._wraps = [
            # The host calls the module's hooks for checkpoints of weights alone, too, and before it loads any.
            MethodWrap(pl_module, "on_load_checkpoint", load),
            MethodWrap(pl_module, "on_save_checkpoint", save),
            # The last moment at which the module is whole and unwrapped, with its weights and without optimizers.
            MethodWrap(trainer.strategy, "setup", begin),
            # After an exception: what comes when all callbacks have had their on_exception, and may have saved.
            MethodWrap(trainer.strategy, "on_exception", fail),
        ]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merge_on_end and find_record(pl_module) is not None:
            merge(type(self).__name__, pl_module)
            self._adapted.discard(pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Beside the wrap, for checkpoints that are saved when a run is over.
        self._reduce(trainer, pl_module, checkpoint)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo_wraps()

    # ------------------------------------------------------------------ helpers

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adapt the module of a fit, unless it is."""
        owner, found = self._wish.owner, find_record(pl_module)
        if found is not None:
            self._refuse_others(found[2], found[0], "this module")
            self._adapted.add(pl_module)
            return
        if pl_module in self._adapted:
            raise ValueError(
                f"{owner}: {type(pl_module).__name__} had adapters and has none now: configure_model or setup built "
                "the model anew. The host calls both in each run; let them return at once if the model is there."
            )
        if trainer.state.fn == TrainerFn.FITTING:
            adapt(self._wish, trainer, pl_module)
            self._adapted.add(pl_module)
        else:
            rank_zero_warn(
                f"{owner}: {type(pl_module).__name__} has no adapters and no checkpoint gave it any, so it runs as the "
                "plain base. Give ckpt_path, or fit first."
            )

    def _prepare_load(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the module what the checkpoint's weights are of, and add to these what the base gives."""
        owner = self._wish.owner
        stored, found = stored_record(owner, checkpoint), find_record(pl_module)
        if stored is None:
            self._refuse_plain(trainer, pl_module, checkpoint, adapted=found is not None)
            return
        path = checkpoint[KEY]["model"]
        self._refuse_others(stored, path, "the checkpoint")
        if found is None:
            convert_first(trainer, pl_module)
            model = find_model(owner, pl_module, self._wish.model)
            restore(
                owner,
                pl_module,
                model,
                checkpoint,
                stored,
                trainable=self._wish.trainable,
                upcast=not keeps_half(trainer),
            )
            self._adapted.add(pl_module)
        else:
            _refuse_other_start(owner, found[2], stored, checkpoint[KEY]["save"])
            take_base(found[2], stored, full=checkpoint[KEY]["save"] == "full")
        complete(pl_module, checkpoint, stored)

    def _reduce(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        optimized = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        reduce_checkpoint(pl_module, checkpoint, self.save, optimized)

    def _refuse_others(self, record: Record, path: str, whose: str) -> None:
        """Raise ``ValueError`` if adapters are others than those asked for."""
        where = "in the checkpoint" if whose == "the checkpoint" else "in the module"
        found = differences(record, path, self._wish.record(), self._wish.model or "", where)
        if found:
            raise ValueError(
                f"{self._wish.owner}: the adapters of {whose} are others than those asked for: {'; '.join(found)}. "
                f"Give {self._wish.owner} the settings that they were made with."
            )

    def _refuse_plain(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any], *, adapted: bool
    ) -> None:
        """Raise ``ValueError`` if a checkpoint without adapters is to go on as a run with them."""
        if adapted or (trainer.state.fn == TrainerFn.FITTING and checkpoint.get("optimizer_states")):
            raise ValueError(
                f"{self._wish.owner}: the checkpoint has no adapters, and a run with them cannot go on from it. To "
                "start from its weights, load them into the module first, by load_state_dict."
            )

    def _refuse_company(self, trainer: Trainer) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
                f"{type(self).__name__} does not work with {type(trainer.strategy).__name__}: adapters start from "
                "whole weights. Use a strategy that keeps them, such as 'ddp' or a single device."
            )

        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(  # noqa: TRY004
                f"{type(self).__name__} does not work with processes that are spawned or forked: this one's module "
                "would get their weights and not their adapters. Use strategy='ddp', or start processes by torchrun."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # the host's own annotations lack it
            if isinstance(other, (StochasticWeightAveraging, WeightAveraging)):
                raise ValueError(  # noqa: TRY004
                    f"{type(self).__name__} and {type(other).__name__} are both callbacks here: that one "
                    "copies the module before it has adapters. Use EMA of lightning_stable.callbacks instead."
                )

    def _undo_wraps(self) -> None:
        for wrap in reversed(self._wraps):
            wrap.undo()
        self._wraps = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_wraps": [], "_adapted": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._adapted = weakref.WeakSet()


def _refuse_other_start(owner: str, present: Record, stored: Record, save: str) -> None:
    """Raise ``ValueError`` if an adapted module stands on another base than the checkpoint's adapters."""
    same = present.shift.keys() == stored.shift.keys() and all(
        torch.equal(factors[part], stored.shift[name][part])
        for name, factors in present.shift.items()
        for part in ("a", "b")
    )
    beside = all(stored.rest.get(name, mark) == mark for name, mark in present.rest.items())
    alike = present.scaling == stored.scaling
    # All weights of a full checkpoint are loaded, but not how many directions each layer has, and by what they count.
    if not alike or (save != "full" and not (same and beside and present.base == stored.base)):
        raise ValueError(
            f"{owner}: the module has adapters with another start than the checkpoint's, so its base is another one. "
            "Build the module anew, and load the checkpoint into that."
        )


def _named_loss(owner: str, path: str | None) -> Loss | None:
    if path is None:
        return None
    place, _, name = path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{owner}: init_loss={path!r} cannot be imported ({error}). Give the dotted path of a function of module "
            "and batch, such as 'package.module.function'."
        ) from error
    if not callable(found):
        raise ValueError(f"{owner}: init_loss={path!r} is no function but a {type(found).__name__}.")  # noqa: TRY004
    loss: Loss = found
    return loss
