"""From the plain settings of a simulated precision to one quantizer for each operand."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_stable.functional.quantize import Quantizer, parse_format

__all__ = ["Recipe", "build_recipe", "describe"]


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
