"""From the plain settings of a simulated precision to one quantizer for each operand, and what they exclude."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_stable.functional._settings import check_choice, check_count, check_positive
from lightning_stable.functional.exponent_bias import METRICS
from lightning_stable.functional.fading_helper import helper_ranks
from lightning_stable.functional.quantize import ESTIMATORS, Quantizer, parse_format
from lightning_stable.functional.teacher_intervention import GRADIENTS
from lightning_stable.precision._host import COMPUTE
from lightning_stable.precision._presets import PRESETS, PROJECTIONS

__all__ = ["TEACHERS", "Recipe", "build_recipe", "check_settings", "describe", "with_preset"]

TEACHERS = ("start", "present")


class Recipe(NamedTuple):
    """A quantizer for each operand; ``None`` leaves it as it is."""

    weights: Quantizer | None
    activations: Quantizer | None
    gradients: Quantizer | None

    @property
    def is_random(self) -> bool:
        """Whether an operand is rounded by chance."""
        return any(quantizer is not None and quantizer.rounding == "stochastic" for quantizer in self)


def build_recipe(owner: str, settings: Mapping[str, Any]) -> Recipe:
    """Return the quantizers that the settings of a precision ask for.

    Args:
        owner: The class that is named in errors.
        settings: The settings by name.

    Raises:
        ValueError: If a format, a scaling or another setting is unknown, or has no meaning with another one.
    """
    check_choice("estimator", settings["estimator"], ESTIMATORS)
    check_count("keep_outliers", settings["keep_outliers"], 0, "activations")

    def quantizer(operand: str, **more: Any) -> Quantizer | None:
        name = settings[f"{operand}s"]
        if name is None:
            return None
        try:
            own = settings[f"{operand}_scaling"]
            shared = "none" if parse_format(name).block else settings["scaling"]
            return Quantizer(
                format=name,
                scaling=shared if own is None else own,
                rounding=settings[f"{operand}_rounding"] or settings["rounding"],
                passes_saturated=settings["passes_saturated"],
                padding=settings["padding"],
                estimator=settings["estimator"] if name == "binary" and operand != "gradient" else "identity",
                **more,
            )
        except ValueError as error:
            raise ValueError(f"{owner}, {operand}s: {error}") from error

    return Recipe(
        quantizer("weight", asymmetric=settings["asymmetric_weights"]),
        quantizer("activation", keep_outliers=settings["keep_outliers"]),
        quantizer("gradient"),
    )


def describe(quantizer: Quantizer | None) -> str:
    """Return a quantizer in a few words."""
    if quantizer is None:
        return "as they are"
    words = [quantizer.format]
    if quantizer.scaling != "none":
        words.append(f"a scale for each {quantizer.scaling}")
    words += ["asymmetric"] if quantizer.asymmetric else []
    words += [f"{quantizer.keep_outliers} largest exact"] if quantizer.keep_outliers else []
    words += [quantizer.rounding] if quantizer.rounding != "nearest" else []
    return ", ".join(words)


def with_preset(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those of the preset in their places, and patterns as lists.

    Args:
        given: The settings by name.
        defaults: What they are where nothing is given.

    Raises:
        ValueError: If the preset is unknown or contradicted, or patterns are no list.
    """
    settings = dict(given)
    for name in ("include", "exclude", "teacher_modules"):
        if isinstance(given[name], str):
            raise ValueError(f"{name}={given[name]!r} is one string. Give a list of patterns, as [{given[name]!r}].")  # noqa: TRY004
        settings[name] = list(given[name])
    preset = given["preset"]
    if preset is None:
        return settings
    check_choice("preset", preset, tuple(PRESETS))
    for name, value in PRESETS[preset].items():
        if given[name] not in (defaults[name], value):
            raise ValueError(
                f"preset={preset!r} sets {name}={value!r}, and {name}={given[name]!r} was given. Leave out one of them."
            )
    names = {"include": list(PROJECTIONS)} if settings["include"] == list(defaults["include"]) else {}
    return {**settings, **PRESETS[preset], **names}


def check_settings(owner: str, settings: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise ``ValueError`` if a setting is unknown, or has no meaning with what is quantized."""
    check_choice("compute", settings["compute"], COMPUTE)
    check_count("seed", settings["seed"], 0, "seeds")
    threshold = settings["outlier_threshold"]
    if threshold is not None:
        check_positive("outlier_threshold", threshold, "the smallest magnitude of an outlier")
        if recipe.activations is None:
            raise ValueError(
                f"outlier_threshold={threshold!r} of {owner} keeps features of the activations exact, and with "
                "activations=None all are. Give activations a format, as in 'int8'."
            )
    if settings["estimator"] == "reste" and not any(
        quantizer is not None and quantizer.estimator == "reste" for quantizer in recipe
    ):
        raise ValueError(
            f"estimator='reste' of {owner} is the gradient of 'binary' weights and activations, and neither is binary. "
            "Set one of them to 'binary', or leave the estimator at 'identity'."
        )
    _check_search(owner, settings, recipe)
    _check_helper(owner, settings, recipe)
    _check_teacher(owner, settings, recipe)


def _check_search(owner: str, settings: Mapping[str, Any], recipe: Recipe) -> None:
    check_count("bias_search_batches", settings["bias_search_batches"], 1, "batches")
    check_choice("bias_search_metric", settings["bias_search_metric"], METRICS)
    if not settings["search_bias"]:
        return
    operands = [quantizer for quantizer in (recipe.weights, recipe.activations) if quantizer is not None]
    for quantizer in operands:
        try:
            replace(quantizer, exponent_bias=0.0)
        except ValueError as error:
            raise ValueError(f"search_bias of {owner} is for float formats with scaling='none'. ({error})") from error
    if not operands:
        raise ValueError(f"search_bias of {owner} has nothing to search with weights=None and activations=None.")


def _check_helper(owner: str, settings: Mapping[str, Any], recipe: Recipe) -> None:
    rank, steps = settings["helper_rank"], settings["helper_phase_steps"]
    if steps is not None:
        check_count("helper_phase_steps", steps, 1, "optimizer steps")
        if rank is None:
            raise ValueError(f"helper_phase_steps={steps!r} of {owner} has no helper. Give helper_rank, as in 32.")
    if rank is not None:
        helper_ranks(rank)
        if recipe.weights is None:
            raise ValueError(
                f"helper_rank={rank!r} of {owner} stands by for what quantization takes from weights, and with "
                "weights=None it takes nothing. Give weights a format, as in 'int4'."
            )


def _check_teacher(owner: str, settings: Mapping[str, Any], recipe: Recipe) -> None:
    modules, steps = settings["teacher_modules"], settings["teacher_steps"]
    check_choice("teacher_weights", settings["teacher_weights"], TEACHERS)
    check_choice("teacher_gradients", settings["teacher_gradients"], GRADIENTS)
    if steps is not None:
        check_count("teacher_steps", steps, 1, "optimizer steps")
    if bool(modules) != (steps is not None):
        raise ValueError(
            f"teacher_modules={modules!r} and teacher_steps={steps!r} of {owner} go together: which modules have the "
            "teacher's outputs, and for how many optimizer steps. Give both, or neither."
        )
    if modules and all(quantizer is None for quantizer in recipe):
        raise ValueError(f"teacher_modules of {owner} has nothing to teach: no operand is quantized. Give a format.")
