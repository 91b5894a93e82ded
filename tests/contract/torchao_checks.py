"""The rows of the precision plugins on torchao, and their oracle: torchao by hand, step for step and bit for bit.

The layers of the contracts' modules are narrow, which emulation takes and kernels do not. The settings are those whose
scales do not depend on how samples are divided among processes: one a row, and the gradient of the weight exact.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from oracles.replay import Replay
from torch import nn

from lightning_stable.precision.float8 import Float8Precision
from lightning_stable.precision.int8 import Int8Precision
from lightning_stable.testing.harness import Run, assert_same, fit
from lightning_stable.testing.rows import STEPS, PrecisionSettings, Settings
from lightning_stable.testing.streams import Stream

ALL: dict[str, Any] = {"exclude": (), "width_multiple": 1}
# The first steps end before a checkpoint is saved.
FIRST = 3
FLOAT8: dict[str, Any] = {**ALL, "recipe": "rowwise_with_gw_hp", "first_steps_high_precision": FIRST}
INT8: dict[str, Any] = {**ALL, "grad_weight": False, "first_steps_high_precision": FIRST}

Conversion = Callable[[nn.Module], Any]


def to_float8(recipe: str) -> Conversion:
    """Return what converts a module as torchao's documentation says, emulated."""
    from dataclasses import replace

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    return lambda module: convert_to_float8_training(module, config=config)


def to_int8(**products: bool) -> Conversion:
    """Return what converts a module to int8 by torchao, by swapped modules."""
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    return lambda module: quantize_(module, Int8MixedPrecisionTrainingConfig(**products, module_swap=True))


def _heed_autocast(module: nn.Module) -> None:
    """Let torchao's layers do on the CPU what torch's do under autocast: input and bias are in bfloat16."""
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue

        def forward(x: torch.Tensor, layer: Any = layer, names: tuple[str, ...] = tuple(vars(layer))) -> torch.Tensor:
            x = x.bfloat16() if torch.is_autocast_enabled("cpu") else x
            parts = {name: getattr(layer, name) for name in ("config", "linear_mm_config") if name in names}
            view = SimpleNamespace(weight=layer.weight, bias=layer.bias.to(x.dtype), **parts)
            return type(layer).forward(view, x)

        layer.forward = forward


def _check(run: Run, convert: Conversion, first: int, what: str) -> None:
    changed = 0
    for replayed in Replay(run):
        plain = replayed.gradients()
        if replayed.number == first:
            convert(replayed.module)
            _heed_autocast(replayed.module)
        expected = replayed.gradients()
        found = replayed.step.gradients
        assert_same(found, expected, f"{what}, step {replayed.number}: gradients")
        changed += any(not torch.allclose(plain[name], expected[name], rtol=1e-4) for name in plain)
    assert first > 0 or changed, f"{what}: the oracle computes as without torchao"


def _again(run: Run, plugin: Any) -> Run:
    return fit(
        [plugin],
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        accumulate_grad_batches=run.trainer.accumulate_grad_batches,
        gradient_clip_val=run.trainer.gradient_clip_val,
    )


def float8(run: Run, plugin: Float8Precision) -> None:
    compute = run.trainer.precision
    _check(run, to_float8("rowwise_with_gw_hp"), FIRST, "Float8Precision")
    for recipe in ("tensorwise", "rowwise"):
        done = _again(run, Float8Precision(recipe, **ALL, compute=compute))
        _check(done, to_float8(recipe), 0, f"Float8Precision({recipe!r})")


def int8(run: Run, plugin: Int8Precision) -> None:
    compute = run.trainer.precision
    _check(run, to_int8(grad_weight=False), FIRST, "Int8Precision without grad_weight")
    _check(_again(run, Int8Precision(**ALL, compute=compute)), to_int8(), 0, "Int8Precision")


_NOT_SWITCHED = {"precision_fallback": "switches layers that SimulatedPrecision converts"}

SETTINGS: dict[str, Settings] = {
    "float8": PrecisionSettings(
        make=lambda: Float8Precision(**FLOAT8),
        under=lambda precision: Float8Precision(**FLOAT8, compute=precision),
        oracle=float8,
        # The first steps are longer than the run.
        identities=(lambda: Float8Precision(**{**FLOAT8, "first_steps_high_precision": 10 * STEPS}),),
        conflicts=_NOT_SWITCHED,
    ),
    "int8": PrecisionSettings(
        make=lambda: Int8Precision(**INT8),
        under=lambda precision: Int8Precision(**INT8, compute=precision),
        oracle=int8,
        identities=(lambda: Int8Precision(**{**INT8, "first_steps_high_precision": 10 * STEPS}),),
        conflicts=_NOT_SWITCHED,
    ),
}
