"""The rows of adapters, and their oracles: what trains follows from the gradients of a plain module's weights."""

from collections.abc import Callable
from typing import Any

import torch
from contract.oracle_checks import _assert_gradients
from lightning.pytorch import LightningModule
from oracles.adapter_training_twin import Adapted, Descent, clipped, loldu, lora, svfit
from oracles.replay import Replay
from torch import Tensor

from lightning_stable.peft import Adapters, ReorthogonaliseLoRA
from lightning_stable.testing.harness import Net, Run, Step, assert_same, differences
from lightning_stable.testing.rows import STEPS, PeftSettings, Settings

Named = dict[str, Tensor]

_RANK, _SCALE = 2, 1.5
# Neither after the last step of a run nor after the one at which it is cut.
_EVERY = 5
_LAYERS = ("body.0", "head")
# Of every module of the contracts.
_TARGETS = r"body\.0|head|layer"
_MOMENTUM = 0.9
# Biases train beside the adapters, that of the normalisation too.
_WITH: dict[str, Any] = {"model": None, "trainable": ["*bias"]}

_NO_IDENTITY = "It has no setting at which it changes nothing: other parameters train than without it."


def adapters() -> Adapters:
    config = {"r": _RANK, "lora_alpha": _RANK * _SCALE, "target_modules": _TARGETS}
    return Adapters(config, init="pissa", **_WITH)


def loldu_adapters() -> Adapters:
    return Adapters({"r": _RANK, "alpha": _RANK * _SCALE, "target_modules": _TARGETS}, init="loldu", **_WITH)


def svfit_adapters() -> Adapters:
    return Adapters({"r": _RANK, "target_modules": _TARGETS}, init="svfit", **_WITH)


def inject_lora(module: LightningModule) -> None:
    """Put adapters of LoRA into a module, as its own constructor would; their product is not 0."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=_RANK, lora_alpha=1, target_modules=_TARGETS, init_lora_weights=False), module)


def _tolerance(run: Run) -> float:
    # What is rounded in the middle of a layer with an adapter is not rounded in one with a plain weight.
    return 5e-2 if run.trainer.precision == "bf16-mixed" else 1e-4


def _assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    distance = float((found.double() - expected.double()).norm())
    assert distance <= tolerance * float(expected.double().norm()), f"{what}: off by {distance:.3g}"


def _rates(step: Step, names: Any) -> dict[str, float]:
    return {name: step.rates[0 if name.startswith("body.") else 1] for name in names}


class _PlainTwin:
    """A plain module whose adapted weights follow from numbers that train."""

    def __init__(self, start: Callable[[Tensor, int, float], Adapted]) -> None:
        self.plain = {name: value.detach().clone() for name, value in Net().named_parameters()}
        self.layers = {layer: start(self.plain[f"{layer}.weight"], _RANK, _SCALE) for layer in _LAYERS}

    def trained(self) -> Named:
        """Return what trains and where it starts, under the names of the adapted module."""
        numbers = {f"{layer}.{name}": v for layer, each in self.layers.items() for name, v in each.trained.items()}
        return numbers | {self.adapted_name(name): v for name, v in self.plain.items() if name.endswith("bias")}

    def adapted_name(self, name: str) -> str:
        """Return the name in the adapted module of a plain one's parameter."""
        layer, _, parameter = name.rpartition(".")
        return f"{layer}.base_layer.{parameter}" if layer in _LAYERS else name

    def weights(self, numbers: Named) -> Named:
        """Return the weights of the plain module that computes what the adapted one does."""
        found = {name: numbers.get(self.adapted_name(name), value).double() for name, value in self.plain.items()}
        for layer, adapted in self.layers.items():
            found[f"{layer}.weight"] = adapted.weight({name: numbers[f"{layer}.{name}"] for name in adapted.trained})
        return found

    def gradients(self, numbers: Named, of_plain: Named) -> Named:
        """Return the gradients of what trains, from those of the plain module's weights."""
        found = {self.adapted_name(name): value for name, value in of_plain.items() if name.endswith("bias")}
        for layer, adapted in self.layers.items():
            own = {name: numbers[f"{layer}.{name}"].detach() for name in adapted.trained}
            ofs = adapted.gradients(own, of_plain[f"{layer}.weight"])
            found |= {f"{layer}.{name}": value for name, value in ofs.items()}
        return found


def _assert_started(run: Run, twin: _PlainTwin, exact: bool) -> None:
    """Fail if the function, the numbers that train or the base are others at the start than the equations say."""
    before = run.steps[0].before
    for layer, adapted in twin.layers.items():
        own = {name: before[f"{layer}.{name}"].double() for name in adapted.trained}
        _assert_near(adapted.weight(own), twin.plain[f"{layer}.weight"], 1e-5, f"the weight of {layer} at the start")
        for name, value in adapted.trained.items():
            if adapted.matched:
                _assert_near(own[name], value, 1e-4, f"{layer}.{name} at the start")
        base = before[f"{layer}.base_layer.weight"]
        if exact:  # the base is left alone
            assert torch.equal(base, twin.plain[f"{layer}.weight"]), f"the base of {layer} was changed"
            continue
        _assert_near(
            base, adapted.weight({name: 0 * v for name, v in adapted.trained.items()}), 1e-4, f"the base of {layer}"
        )
        for mine, theirs in zip(own.values(), adapted.trained.values(), strict=True):
            # Balanced, and up to signs the singular vectors.
            grams = [(m @ m.T if m.shape[0] == _RANK else m.T @ m).abs() for m in (mine, theirs)]
            _assert_near(*grams, 1e-4, f"the factors of {layer} at the start")


def _trains_only(start: Callable[[Tensor, int, float], Adapted], exact: bool) -> Callable[[Run, Any], None]:
    """Return the oracle of adapters of a kind."""

    def oracle(run: Run, plugin: Adapters) -> None:
        twin, tolerance = _PlainTwin(start), _tolerance(run)
        _assert_started(run, twin, exact)
        trained = twin.trained()
        descent = Descent(trained, _MOMENTUM)
        _assert_only_these_move(run, set(trained))
        # The recorded steps as those of a plain module, and another way that starts alike and goes by itself.
        recorded = [step._replace(before=_single(twin.weights(step.before))) for step in run.steps]
        for replayed, step in zip(Replay(run, steps=recorded), run.steps, strict=True):
            expected = twin.gradients(step.before, replayed.gradients())
            of_step = replayed.step
            replayed.step = of_step._replace(gradients={name: step.gradients[name] for name in expected})
            _assert_gradients(replayed, expected, f"adapters by {start.__name__}", exact=tolerance)
            replayed.step = of_step
            alone = twin.gradients(descent.numbers, replayed.gradients(_single(twin.weights(descent.numbers))))
            descent.step(clipped(alone, run.trainer.gradient_clip_val), _rates(step, trained))
            now, theirs = twin.weights(descent.numbers), twin.weights(step.weights)
            for name, value in now.items():
                _assert_near(theirs[name], value, tolerance, f"{name} of the merged module after {replayed.number + 1}")
        assert differences(run.steps[-1].weights, run.steps[0].before), "nothing was trained"

    return oracle


def _single(weights: Named) -> Named:
    return {name: value.detach().float() for name, value in weights.items()}


def _assert_only_these_move(run: Run, trained: set[str]) -> None:
    for number, step in enumerate(run.steps):
        assert step.gradients.keys() == trained, f"step {number}: {step.gradients.keys() ^ trained} differ"
    first, last = run.steps[0].before, dict(run.module.named_parameters())
    frozen = {name: value for name, value in first.items() if name not in trained}
    assert frozen, "nothing is frozen"
    assert_same({name: last[name].detach() for name in frozen}, frozen, "frozen weights at the end")


def reorthogonalise_lora(run: Run, plugin: ReorthogonaliseLoRA) -> None:
    descent, tolerance, turned = Descent(_trainable(run.steps[0].before), _MOMENTUM), _tolerance(run), 0
    for replayed in Replay(run):
        step, number = replayed.step, replayed.number
        raw = replayed.gradients() if number == 0 else replayed.gradients(step.before)
        _assert_gradients(replayed, {name: raw[name] for name in _trainable(step.before)}, "ReorthogonaliseLoRA")
        # From the recorded numbers: what the optimizer keeps is the twin's own.
        descent.numbers = {name: value.double() for name, value in _trainable(step.before).items()}
        descent.step(clipped(_trainable(raw), run.trainer.gradient_clip_val), _rates(step, _trainable(step.before)))
        for name, value in descent.numbers.items():
            _assert_near(step.weights[name], value, tolerance, f"{name} after step {number}")
        if number + 1 == STEPS:
            after = {name: value.detach() for name, value in run.module.named_parameters()}
        else:
            after = run.steps[number + 1].before
        if (number + 1) % _EVERY:
            assert_same(after, step.weights, f"weights that nobody may change after step {number}")
            continue
        turned += 1
        for layer in _LAYERS:
            _turn(layer, step.weights, after, descent.averages)
        others = {name: value for name, value in after.items() if "lora_" not in name}
        assert_same({name: step.weights[name] for name in others}, others, f"what is no factor, after step {number}")
    assert turned == STEPS // _EVERY


def _trainable(weights: Named) -> Named:
    return {name: value for name, value in weights.items() if "lora_" in name}


def _turn(layer: str, before: Named, after: Named, averages: Named) -> None:
    """Check that new factors are the decomposition of the old ones' product, and change averages as they changed."""
    names = f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"
    (a, b), (new_a, new_b) = ([weights[name].double() for name in names] for weights in (before, after))
    u, sizes, vt = torch.linalg.svd(b @ a, full_matrices=False)
    signs = vt[:_RANK].gather(1, vt[:_RANK].abs().argmax(1, keepdim=True)).sign()
    _assert_near(new_a, signs * vt[:_RANK], 1e-4, f"A of {layer}")
    _assert_near(new_b, u[:, :_RANK] * sizes[:_RANK] * signs.T, 1e-4, f"B of {layer}")
    _assert_near(new_b @ new_a, b @ a, 1e-5, f"the product of {layer}")
    # B' = B P and A' = P^-1 A, with orthonormal rows of A': gradients change by the chain rule.
    turn = a @ new_a.T
    averages[names[0]] = turn.T @ averages[names[0]]
    averages[names[1]] = averages[names[1]] @ torch.linalg.inv(turn).T


_KEEPS_VALUES = "are both among the Trainer's callbacks"
_PLAIN_MEAN = "needs rounds that end in a plain mean"

SETTINGS: dict[str, Settings] = {
    "adapters": PeftSettings(
        make=adapters,
        oracle=_trains_only(lora, exact=False),
        identities=(),
        adapts=True,
        expected_failures={"inert": _NO_IDENTITY},
    ),
    "loldu": PeftSettings(
        make=loldu_adapters,
        oracle=_trains_only(loldu, exact=True),
        identities=(),
        carrier="Adapters",
        company=("ema", "sam"),  # the first row's class is in all company
        adapts=True,
        expected_failures={"inert": _NO_IDENTITY},
    ),
    "svfit": PeftSettings(
        make=svfit_adapters,
        oracle=_trains_only(svfit, exact=True),
        identities=(),
        carrier="Adapters",
        company=("ema", "sam"),  # the first row's class is in all company
        adapts=True,
        expected_failures={"inert": _NO_IDENTITY},
    ),
    "reorthogonalise_lora": PeftSettings(
        make=lambda: ReorthogonaliseLoRA(every_n_steps=_EVERY),
        oracle=reorthogonalise_lora,
        identities=(lambda: ReorthogonaliseLoRA(every_n_steps=10**6),),
        prepare=inject_lora,
        conflicts={
            **dict.fromkeys(("ema", "balanced_ema", "mesa", "lae", "ewc", "l2_anchor", "stable_spam"), _KEEPS_VALUES),
            **dict.fromkeys(("co2", "slowmo", "diloco"), _PLAIN_MEAN),
            "one_bit_adam": "exchanges averages of gradients",
        },
    ),
}
