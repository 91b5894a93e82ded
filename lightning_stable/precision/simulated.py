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
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_stable.functional.simulated import convert, quantized_layers, restore
from lightning_stable.precision._first_batch import FirstBatch
from lightning_stable.precision._host import host_precision, refuse_sharded, trainer_of
from lightning_stable.precision._names import layers_line, unused_patterns
from lightning_stable.precision._parts import Part
from lightning_stable.precision._plan import new_parts
from lightning_stable.precision._recipe import build_recipe, check_settings, describe, with_preset

__all__ = ["SimulatedPrecision"]


class SimulatedPrecision(Precision):
    r"""Train with quantized operands in the products of linear and convolutional layers, simulated on any machine.

    The forward product and both backward products of each chosen layer see weights, inputs and gradients in the
    formats you name (equations: :mod:`lightning_stable.functional.simulated`, formats and rounding:
    :mod:`lightning_stable.functional.quantize`). The weights that are trained stay in full precision, biases and their
    gradients too; everything else computes in ``compute``. Layers are converted in place while the Trainer runs and
    are themselves again afterwards; names in checkpoints are those of the module, and tied weights stay tied.

    At the start of a fit a line says what was converted, what was left out, and how long a helper or a teacher acts.
    Patterns that do nothing are warned about, and a helper or a teacher that outlasts the fit. On the first batch the
    layers are checked: one that does not quantize is an error, one that does not run is warned about. The cosine
    between the quantized and the exact gradient of the converted layers is reported, with a warning below 0.9, from two
    further passes that leave no trace.

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
        search_bias: Search a real-valued exponent bias for the weights and the inputs of each layer on the first
            batches of a fit, which stays (LLM-FP4). For float formats with ``scaling="none"``.
        bias_search_batches: On how many batches; the biases are those of the batches so far.
        bias_search_metric: The least squared error of what counts: ``"output"``, the layer's product, as in the paper;
            or ``"tensor"``, the operand itself, which takes no products.
        estimator: Gradient of ``"binary"`` weights and activations: ``"identity"`` or ``"reste"`` (ReSTE), whose
            exponent rises over training.
        helper_rank: Rank of a low-rank helper beside each quantized weight, which makes up for the largest part of what
            rounding takes and fades over training until it is gone (QVGen); ``None``: none.
        helper_phase_steps: Optimizer steps after which the helper's rank is halved; ``None`` divides the fit evenly.
        teacher_modules: Patterns of the dotted names of modules whose outputs are at first a teacher's, the same module
            without quantization (Teacher Intervention). Of modules within each other the outermost counts.
        teacher_steps: For how many optimizer steps.
        teacher_weights: The teacher's weights: ``"start"``, those the fit begins with, or ``"present"``.
        teacher_gradients: ``"through"`` trains a module as if its output had not been replaced; ``"stop"`` lets no
            gradient pass to it, as in the released code, where losses of its own train it.
        include: Patterns of the dotted names of layers, as in ``"*.mlp.*"``; one of them has to match. Case counts.
        exclude: Patterns none of which may match.
        preset: ``"stable_spam_int4"`` for the 4-bit set-up of Stable-SPAM: it settles formats, scales and outliers, and
            without an ``include`` of yours the projections of Llama-like blocks. ``None`` for the settings above.
        compute: What the rest of the module computes in: ``"32-true"``, ``"bf16-mixed"`` or ``"bf16-true"``. In bf16
            the quantized values are rounded once more, to bf16; ``"32-true"`` simulates exactly.
        check_gradients: Compare gradients on the first batch of a fit.
        seed: Of stochastic rounding.

    Raises:
        ValueError: If a setting is unknown or has no meaning with another one; at the start of a run if no layer or
            module matches, or a group does not divide a width and ``padding`` is false, or the strategy shards weights,
            or a teacher or a search has no pass of its own; in training if a teacher's pass is not like the module's.
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
        bias_search_batches: int = 2,
        bias_search_metric: str = "output",
        estimator: str = "identity",
        helper_rank: int | None = None,
        helper_phase_steps: int | None = None,
        teacher_modules: Sequence[str] = (),
        teacher_steps: int | None = None,
        teacher_weights: str = "start",
        teacher_gradients: str = "through",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("*head*", "*norm*"),
        preset: str | None = None,
        compute: str = "32-true",
        check_gradients: bool = True,
        seed: int = 0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        owner, defaults = type(self).__name__, _defaults()
        self.settings = with_preset(given, defaults)
        self.recipe = build_recipe(owner, self.settings)
        check_settings(owner, self.settings, self.recipe)
        # The preset's names are those of many models, and nobody's own.
        self._own = [
            [] if list(given[name]) == list(defaults[name]) else list(given[name]) for name in ("include", "exclude")
        ]
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
        self._parts = self._new_parts()
        # The module that what was found belongs to; ``None`` before the first one, which is given what was loaded.
        self._found_on: weakref.ref[nn.Module] | None = None

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
            refuse_sharded(type(self).__name__, trainer)
            device, self._rank = trainer.strategy.root_device, trainer.global_rank
        if isinstance(self._rest, MixedPrecision):
            self._rest.device = device.type
        self._generator = torch.Generator(device) if self.recipe.is_random else None
        fitted = trainer if trainer is not None and trainer.state.fn == TrainerFn.FITTING else None
        if fitted is not None or (self._found_on is not None and self._found_on() is not module):
            # What was found on another module would go to layers of the same names.
            self._batches, self._parts = 0, self._new_parts()
        self._found_on = weakref.ref(module)
        names = self._convert(module)
        if fitted is not None:
            self._begin_fit(fitted, module, names)
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
        with self.forward_context(), ExitStack() as contexts:
            for part in self._parts:
                contexts.enter_context(part.step_context())
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
        for part in self._parts:
            part.stop()
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
        for part in self._parts:
            state |= part.state_dict()
        return state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The host leaves out a state that is empty, and would leave what was found before.
        if type(self).__qualname__ not in checkpoint:
            self.load_state_dict({})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = int(state_dict.get("batches", 0))
        if self._first_batch is None:
            # Outside of a fit, so that nothing stays of what was found before.
            self._parts = self._new_parts()
            for state in quantized_layers(self._converted).values() if self._converted is not None else ():
                state.weights, state.activations, state.gradients = self.recipe
        if self._converted is None:
            self._found_on = None
        for part in self._parts:
            part.load_state_dict(state_dict)
            if self._converted is not None:
                part.apply(self._converted)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference does not go to another process, and nor does the module itself.
        return {**self.__dict__, "_found_on": None}

    def __str__(self) -> str:
        # What the host says of a precision that it cannot take.
        return (
            f"{type(self).__name__} (which works on a single device and with strategy='ddp', and takes what the rest "
            f"computes in as its own argument, compute={self.precision!r})"
        )

    # ------------------------------------------------------------------ helpers

    def _new_parts(self) -> list[Part]:
        return new_parts(type(self).__name__, self.settings, self.forward_context)

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
        for part in self._parts:
            part.apply(module)
        if any(isinstance(part, nn.TransformerEncoderLayer) for part in module.modules()):
            # In evaluation it would multiply by the weights of its linear layers itself.
            self._fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        return names

    def _begin_fit(self, trainer: Trainer, module: nn.Module, names: list[str]) -> None:
        owner, include, exclude = type(self).__name__, self.settings["include"], self.settings["exclude"]
        operands = "; ".join(f"{operand} {describe(found)}" for operand, found in self.recipe._asdict().items())
        lines = [layers_line(module, names, include, exclude), *(part.line() for part in self._parts)]
        rank_zero_info(
            f"{owner}: {len(names)} layers converted ({operands}); the rest computes in {self.precision}. "
            f"{' '.join(line for line in lines if line)}"
        )
        for warning in unused_patterns(module, names, *self._own):
            rank_zero_warn(f"{owner}: {warning}")
        if all(quantizer is None for quantizer in self.recipe):
            return
        for part in self._parts:
            part.begin(cast(LightningModule, module))
        compare = bool(self.settings["check_gradients"])
        self._first_batch = FirstBatch(owner, self.forward_context, compare, self._parts)
        self._trainer = trainer
        host = cast(Any, trainer)
        host.callbacks = [self._first_batch, *host.callbacks]

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


def _defaults() -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(SimulatedPrecision).parameters.items()}
