"""What quantizes one operand: format, scaling, rounding and gradient, checked against one another."""

from dataclasses import dataclass
from typing import Any

from lightning_stable.functional._formats import Format, exponent_bias, parse_format
from lightning_stable.functional._rounding import ROUNDINGS
from lightning_stable.functional._settings import check_choice, check_count

__all__ = ["ESTIMATORS", "REACH", "Quantizer"]

ESTIMATORS = ("identity", "reste")
# How many binary orders an exponent bias may lie from the format's own.
REACH = 126


@dataclass(frozen=True)
class Quantizer:
    """How one operand is quantized.

    Args:
        format: The number format, a name that ``parse_format`` knows.
        scaling: Which entries share a scale. ``"none"``: no scale. ``"tensor"``: all. ``"channel"``: those of one index
            of the first dimension, a weight's output channel. ``"row"``: those along the last dimension.
            ``"group:128"``: runs of 128 along the last dimension; for a tensor of four or more dimensions along all but
            the first, flattened. ``"shift:4"``: the channels of the last dimension (the second of a tensor of four or
            more), in four scales that are halvings of the largest. Block formats bring their own and take ``"none"``;
            their blocks run as groups do. A tensor that should be cut up otherwise is reshaped before.
        rounding: ``"nearest"`` with ties to even, ``"stochastic"`` or ``"truncate"`` towards zero.
        keep_outliers: So many entries of largest magnitude stay exact in each group, block, row, channel or tensor; the
            scale is that of the others.
        asymmetric: For integers: all codes from the lowest to the highest entry, instead of symmetric about zero.
        passes_saturated: Whether the straight-through gradient also passes where a value lies beyond the largest of its
            grid. A scale by the largest magnitude has no such value; block scales, which are rounded, and the means of
            binary and ternary have.
        exponent_bias: A real-valued exponent bias instead of the format's own, for float formats without scaling.
        padding: Whether a last group or block that is too short is filled with zeros, or an error.
        estimator: ``"identity"`` for the straight-through gradient, ``"reste"`` for ReSTE's, for binary only.

    Raises:
        ValueError: If a value is unknown or out of range, or has no meaning with another one.
    """

    format: str
    scaling: str = "none"
    rounding: str = "nearest"
    keep_outliers: int = 0
    asymmetric: bool = False
    passes_saturated: bool = True
    exponent_bias: float | None = None
    padding: bool = True
    estimator: str = "identity"

    def __post_init__(self) -> None:
        try:
            parsed = _parse(self)
        except ValueError as error:
            raise ValueError(f"Quantizer: {error}") from error
        # Parsed once: it is read at each call, and a compiled function should not parse names.
        object.__setattr__(self, "_parsed", parsed)

    @property
    def spec(self) -> Format:
        """What the format's name stands for."""
        spec: Format = self.__dict__["_parsed"][0]
        return spec

    @property
    def layout(self) -> str:
        """Which entries share a scale: the scaling without its number, ``"group"`` for block formats."""
        layout: str = self.__dict__["_parsed"][1]
        return layout

    @property
    def size(self) -> int:
        """Entries of a group or block, or the number of scales of ``"shift"``; 0 for the others."""
        size: int = self.__dict__["_parsed"][2]
        return size


def _parse(q: Quantizer) -> tuple[Format, str, int]:
    """Return the format, which entries share a scale, and how many or in how many scales; all checked."""
    spec = parse_format(q.format)
    layout, size = _parse_scaling(q.scaling)
    check_choice("rounding", q.rounding, ROUNDINGS)
    check_count("keep_outliers", q.keep_outliers, 0, "entries of a group")
    check_choice("estimator", q.estimator, ESTIMATORS)
    for name in ("asymmetric", "passes_saturated", "padding"):
        if not isinstance(getattr(q, name), bool):
            raise ValueError(f"{name}={getattr(q, name)!r} is neither True nor False.")  # noqa: TRY004
    _check_bias(q.exponent_bias, spec)
    for name, value, wrong, cure in _conflicts(q, spec, layout):
        if wrong:
            raise ValueError(f"{name}={value!r} has no meaning with format={q.format!r}, {cure}")
    return (spec, "group", spec.block) if spec.block else (spec, layout, size)


def _parse_scaling(scaling: str) -> tuple[str, int]:
    kind, colon, number = scaling.partition(":") if isinstance(scaling, str) else ("", "", "")
    if kind in ("none", "tensor", "channel", "row") and not colon:
        return kind, 0
    if kind in ("group", "shift") and number.isascii() and number.isdigit() and int(number) > 0:
        return kind, int(number)
    raise ValueError(
        f"scaling={scaling!r} is unknown. Choose 'none', 'tensor', 'channel', 'row', 'group:128' (or another number of "
        "entries from 1 on) or 'shift:4' (or another number of scales from 1 on)."
    )


def _conflicts(q: Quantizer, spec: Format, layout: str) -> list[tuple[str, Any, bool, str]]:
    """Return name, value, whether it is wrong, and what to do, for each pair of settings that exclude each other."""
    signs = spec.kind in ("binary", "ternary")
    bias = q.exponent_bias
    plain = spec.kind == "float" and not spec.block and layout == "none"
    reste = q.estimator == "reste"
    return [
        (
            "scaling",
            q.scaling,
            bool(spec.block) and layout != "none",
            "which brings its own scale. Leave it at 'none'.",
        ),
        ("scaling", q.scaling, signs and layout == "shift", "whose scale is a mean. Choose another scaling."),
        ("rounding", q.rounding, signs and q.rounding != "nearest", "which has one way to round. Choose 'nearest'."),
        ("asymmetric", True, q.asymmetric and spec.kind != "integer", "only with 'int2' to 'int8'."),
        ("asymmetric", True, q.asymmetric and layout in ("none", "shift"), f"scaling={q.scaling!r}. Choose a group."),
        (
            "keep_outliers",
            q.keep_outliers,
            q.keep_outliers > 0 and layout == "shift",
            "scaling='shift'. Leave it at 0.",
        ),
        ("estimator", q.estimator, reste and spec.kind != "binary", "only with 'binary'."),
        ("estimator", q.estimator, reste and q.keep_outliers > 0, f"keep_outliers={q.keep_outliers}. Leave it at 0."),
        ("exponent_bias", bias, bias is not None and not plain, "only with a float 'eXmY' and scaling='none'."),
    ]


def _check_bias(bias: float | None, spec: Format) -> None:
    if bias is None:
        return
    own = exponent_bias(spec) if spec.kind == "float" else 0
    # The grid is the format's times 2^(own - bias), which has to be a normal float32.
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(own - bias) <= REACH:
        raise ValueError(
            f"exponent_bias={bias!r} is not a number from {own - REACH} to {own + REACH}. The bias of "
            f"{spec.name!r} is {own}; a higher one makes all values smaller."
        )
