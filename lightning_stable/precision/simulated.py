r"""Low-bit training simulated on any machine: matrix products see operands in the number format you name.

Use it to try a format before there is hardware for it, to find out how few bits a run can do with, and to see which
layers are sensitive. It makes nothing faster: values are rounded to the format's grid and multiplied as usual, which
costs a few passes over each operand. For real low-bit products use ``Float8Precision`` or ``Int8Precision`` on a GPU.

Example:
    >>> from lightning.pytorch import LightningModule, Trainer
    >>> from lightning_stable.precision.simulated import SimulatedPrecision
    >>> precision = SimulatedPrecision(weights="e4m3", activations="e4m3", gradients="e5m2")
    >>> trainer = Trainer(plugins=[precision], accelerator="cpu", logger=False, enable_checkpointing=False)
"""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_stable.functional._settings import check_choice, check_count, check_positive
from lightning_stable.functional.quantize import ESTIMATORS, reste_exponent
from lightning_stable.functional.simulated import convert, quantized_layers, restore, unconvertible
from lightning_stable.precision._bias_search import Biases, apply_biases, search_biases
from lightning_stable.precision._first_batch import FirstBatch
from lightning_stable.precision._host import COMPUTE, host_precision, share_of_training, trainer_of
from lightning_stable.precision._presets import PRESETS, PROJECTIONS
from lightning_stable.precision._recipe import Recipe, build_recipe, describe

__all__ = ["SimulatedPrecision"]


class SimulatedPrecision(Precision):
    r"""Train with quantized operands in the products of linear and convolutional layers, simulated on any machine.

    The forward product and both backward products of each chosen layer see weights, inputs and gradients in the
    formats you name (equations: :mod:`lightning_stable.functional.simulated`, formats and rounding:
    :mod:`lightning_stable.functional.quantize`). The weights that are trained stay in full precision, biases and their
    gradients too; everything else computes in ``compute``. Layers are converted in place while the Trainer runs and
    are themselves again afterwards; names in checkpoints are those of the module, and tied weights stay tied.

    At the start of a fit a line says what was converted. On the first batch the layers are checked: one that does not
    quantize is an error, one that does not run is warned about. The cosine between the quantized and the exact gradient
    of the converted layers is reported, with a warning below 0.9, from two further passes that leave no trace.

    Stochastic rounding draws from a generator of its own, seeded for each batch from ``seed``, the process and the
    number of batches so far. That number is in the checkpoint, and a run resumes bit by bit.

    Args:
        weights: Format of weights, such as ``"e4m3"``, ``"int8"``, ``"mxfp4"`` or ``"ternary"``; ``None`` leaves them.
        activations: Format of the inputs of layers.
        gradients: Format of the gradients that arrive at the outputs of layers.
        scaling: What shares a scale: ``"none"``, ``"tensor"``, ``"channel"``, ``"row"``, ``"group:128"`` or
            ``"shift:4"``. Formats with block scales of their own do without.
        weight_scaling: The same for weights alone; ``None``: as ``scaling`` says.
        activation_scaling: The same for activations alone.
        gradient_scaling: The same for gradients alone.
        rounding: ``"nearest"``, ``"stochastic"`` or ``"truncate"``.
        weight_rounding: The same for weights alone; ``None``: as ``rounding`` says.
        activation_rounding: The same for activations alone.
        gradient_rounding: The same for gradients alone.
        asymmetric_weights: Integer weights use all codes from their lowest to their highest value.
        keep_outliers: So many activations of largest magnitude stay exact within what shares a scale.
        outlier_threshold: Input features with a value of at least this size multiply as they are, with their columns of
            the weight (LLM.int8()); ``None``: none does.
        passes_saturated: Whether gradients pass where a value was beyond the largest of its format.
        padding: Fill a last group or block that is too short with zeros, instead of an error.
        search_bias: Search a real-valued exponent bias for the weights and the inputs of each layer on the first batch
            of a fit, which stays (LLM-FP4). For float formats with ``scaling="none"``.
        estimator: Gradient of ``"binary"`` weights and activations: ``"identity"`` or ``"reste"`` (ReSTE), whose
            exponent rises over training.
        include: Patterns of the dotted names of layers, as in ``"*.mlp.*"``; one of them has to match. Case counts.
        exclude: Patterns none of which may match.
        preset: ``"stable_spam_int4"`` for the 4-bit set-up of Stable-SPAM: it settles formats, scales and outliers, and
            without an ``include`` of yours the projections of Llama-like blocks. ``None`` for the settings above.
        compute: What the rest of the module computes in: ``"32-true"``, ``"bf16-mixed"`` or ``"bf16-true"``. In bf16
            the quantized values are rounded once more, to bf16; ``"32-true"`` simulates exactly.
        check_gradients: Compare gradients on the first batch of a fit.
        seed: Of stochastic rounding.

    Raises:
        ValueError: If a setting is unknown or has no meaning with another one; at the start of a run if no layer
            matches, or a group does not divide a width and ``padding`` is false, or the strategy shards weights.
    """

    def __init__(
        self,
        weights: str | None = "e4m3",
        activations: str | None = "e4m3",
        gradients: str | None = "e5m2",
        scaling: str = "tensor",
        weight_scaling: str | None = None,
        activation_scaling: str | None = None,
        gradient_scaling: str | None = None,
        rounding: str = "nearest",
        weight_rounding: str | None = None,
        activation_rounding: str | None = None,
        gradient_rounding: str | None = None,
        asymmetric_weights: bool = False,
        keep_outliers: int = 0,
        outlier_threshold: float | None = None,
        passes_saturated: bool = True,
        padding: bool = True,
        search_bias: bool = False,
        estimator: str = "identity",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("*head*", "*norm*"),
        preset: str | None = None,
        compute: str = "32-true",
        check_gradients: bool = True,
        seed: int = 0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.settings = _settled(given)
        check_choice("compute", compute, COMPUTE)
        check_choice("estimator", estimator, ESTIMATORS)
        check_count("keep_outliers", keep_outliers, 0, "activations")
        check_count("seed", seed, 0, "seeds")
        self.recipe = build_recipe(type(self).__name__, self.settings)
        if outlier_threshold is not None:
            check_positive("outlier_threshold", outlier_threshold, "the smallest magnitude of an outlier")
            if self.recipe.activations is None:
                raise ValueError(
                    f"outlier_threshold={outlier_threshold!r} of {type(self).__name__} keeps features of the "
                    "activations exact, and with activations=None all are. Give activations a format, as in 'int8'."
                )
        if search_bias:
            _check_searched(type(self).__name__, self.recipe)
        self.precision = cast(Any, compute)
        # What the host itself would take for the rest of the module.
        self._rest = host_precision(compute)
        self._converted: nn.Module | None = None
        self._trainer: Trainer | None = None
        self._first_batch: FirstBatch | None = None
        self._fast_path: bool | None = None
        self._generator: torch.Generator | None = None
        self._rank = 0
        self._batches = 0  # that were trained on
        self._evaluated = 0  # since then
        self._biases: Biases = {}

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self._rest.module_init_context()

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._rest.tensor_init_context()

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        module = self._rest.convert_module(module)
        trainer = trainer_of(module)
        if self._converted is module:
            return module
        self.teardown()
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        if trainer is not None:
            _refuse_sharded(self, trainer)
            device, self._rank = trainer.strategy.root_device, trainer.global_rank
        if isinstance(self._rest, MixedPrecision):
            self._rest.device = device.type
        self._generator = torch.Generator(device) if self.recipe.is_random else None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            self._convert(module)
            return module
        self._batches, self._biases = 0, {}
        self._begin_fit(trainer, module, self._convert(module))
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        return self._rest.convert_input(data)

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        return self._rest.forward_context()

    @override
    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        self._batches, self._evaluated = self._batches + 1, 0
        self._seed()
        with self.forward_context():
            yield

    @override
    @contextmanager
    def val_step_context(self) -> Iterator[None]:
        with self._evaluating():
            yield

    @override
    @contextmanager
    def test_step_context(self) -> Iterator[None]:
        with self._evaluating():
            yield

    @override
    @contextmanager
    def predict_step_context(self) -> Iterator[None]:
        with self._evaluating():
            yield

    @override
    def teardown(self) -> None:
        if self._converted is not None:
            restore(self._converted)
        if self._trainer is not None:
            host = cast(Any, self._trainer)
            host.callbacks = [callback for callback in host.callbacks if callback is not self._first_batch]
        if self._fast_path is not None:
            torch.backends.mha.set_fastpath_enabled(self._fast_path)
        self._converted, self._trainer, self._first_batch, self._fast_path = None, None, None, None
        self._generator, self._evaluated = None, 0

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"batches": self._batches} if self.recipe.is_random else {}
        return {**state, "biases": self._biases} if self.settings["search_bias"] else state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = int(state_dict.get("batches", 0))
        self._biases = dict(state_dict.get("biases", {}))
        if self._converted is not None:
            apply_biases(self._converted, self._biases)

    def __str__(self) -> str:
        # What the host says of a precision that it cannot take.
        return (
            f"{type(self).__name__} (which works on a single device and with strategy='ddp', and takes what the rest "
            f"computes in as its own argument, compute={self.precision!r})"
        )

    # ------------------------------------------------------------------ helpers

    def _convert(self, module: nn.Module) -> list[str]:
        try:
            names = convert(
                module,
                **self.recipe._asdict(),
                include=self.settings["include"],
                exclude=self.settings["exclude"],
                outlier_threshold=self.settings["outlier_threshold"],
                generator=self._generator,
            )
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error
        self._converted = module
        apply_biases(module, self._biases)
        if any(isinstance(part, nn.TransformerEncoderLayer) for part in module.modules()):
            # In evaluation it would multiply by the weights of its linear layers itself.
            self._fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        return names

    def _begin_fit(self, trainer: Trainer, module: nn.Module, names: list[str]) -> None:
        rank_zero_info(f"{type(self).__name__}: {self._summary(module, names)}")
        if all(quantizer is None for quantizer in self.recipe):
            return
        compare = bool(self.settings["check_gradients"])
        self._first_batch = FirstBatch(type(self).__name__, self.forward_context, compare, self._before_batch)
        self._trainer = trainer
        host = cast(Any, trainer)
        host.callbacks = [self._first_batch, *host.callbacks]

    def _summary(self, module: nn.Module, names: list[str]) -> str:
        operands = "; ".join(f"{operand} {describe(found)}" for operand, found in self.recipe._asdict().items())
        text = f"{len(names)} layers converted ({operands}); the rest computes in {self.precision}."
        left = unconvertible(module, self.settings["include"], self.settings["exclude"])
        reasons = ", ".join(f"{name!r} ({reason})" for name, reason in left.items())
        return f"{text} Not quantized: {reasons}." if left else text

    def _before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Search what is searched on the first batch, and tell the layers how far training is."""
        if self.settings["search_bias"] and not self._biases:
            found = search_biases(type(self).__name__, pl_module, self.forward_context, batch, batch_idx)
            # Each process has seen another batch.
            self._biases = trainer.strategy.broadcast(found)
            apply_biases(pl_module, self._biases)
        if self.settings["estimator"] != "reste":
            return
        done = share_of_training(trainer)
        if done is None:
            raise ValueError(
                f"estimator='reste' of {type(self).__name__} follows the share of training that is done, and its end "
                "is not known. Set max_steps, or max_epochs with a loader that has a length."
            )
        exponent = reste_exponent(done)
        for state in quantized_layers(pl_module).values():
            state.reste_exponent = exponent

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._evaluated += 1
        self._seed()
        with self.forward_context():
            yield

    def _seed(self) -> None:
        """Let stochastic rounding begin anew, from what a resumed run knows too."""
        if self._generator is not None:
            key = f"{self.settings['seed']} {self._rank} {self._batches} {self._evaluated}"
            self._generator.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))


def _settled(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with those of the preset in their places.

    Raises:
        ValueError: If the preset is unknown or contradicted, or patterns are no list.
    """
    for name in ("include", "exclude"):
        if isinstance(given[name], str):
            raise ValueError(f"{name}={given[name]!r} is one string. Give a list of patterns, as [{given[name]!r}].")  # noqa: TRY004
        given[name] = list(given[name])
    preset = given["preset"]
    if preset is None:
        return given
    check_choice("preset", preset, tuple(PRESETS))
    defaults = {name: each.default for name, each in inspect.signature(SimulatedPrecision).parameters.items()}
    for name, value in PRESETS[preset].items():
        if given[name] not in (defaults[name], value):
            raise ValueError(
                f"preset={preset!r} sets {name}={value!r}, and {name}={given[name]!r} was given. Leave out one of them."
            )
    names = {"include": list(PROJECTIONS)} if given["include"] == list(defaults["include"]) else {}
    return {**given, **PRESETS[preset], **names}


def _check_searched(owner: str, recipe: Recipe) -> None:
    """Raise ``ValueError`` if there is no operand with an exponent bias to search."""
    operands = [quantizer for quantizer in (recipe.weights, recipe.activations) if quantizer is not None]
    for quantizer in operands:
        try:
            replace(quantizer, exponent_bias=0.0)
        except ValueError as error:
            raise ValueError(f"search_bias of {owner} is for float formats with scaling='none'. ({error})") from error
    if not operands:
        raise ValueError(f"search_bias of {owner} has nothing to search with weights=None and activations=None.")


def _refuse_sharded(precision: SimulatedPrecision, trainer: Trainer) -> None:
    """Raise ``ValueError`` if the strategy needs a precision of its own, or shards the weights."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
            f"{type(precision).__name__} does not work with {type(trainer.strategy).__name__}, under which a layer "
            "holds a part of its weight. Use a single device or strategy='ddp'."
        )
