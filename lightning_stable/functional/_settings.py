"""Settings that plugins take as strings, so that YAML can say them: checked, and turned into what torch takes."""

import math

import torch

__all__ = [
    "check_choice",
    "check_count",
    "check_fraction",
    "check_not_negative",
    "check_positive",
    "parse_device",
    "parse_floating_dtype",
]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, allowed))}.")


def check_count(name: str, value: int, lowest: int, unit: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number from ``lowest`` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name}={value!r} is not a whole number of {unit} from {lowest} on.")


def check_fraction(name: str, value: float, meaning: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in [0, 1); ``meaning`` follows "it is"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not in [0, 1): it is {meaning}.")


def check_not_negative(name: str, value: float, meaning: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number from 0 on; ``meaning`` follows "it is"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} is not a finite number from 0 on: it is {meaning}.")


def check_positive(name: str, value: float, meaning: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above 0; ``meaning`` follows "it is"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a finite number above 0: it is {meaning}.")


def parse_device(name: str | None) -> torch.device | None:
    """Return the device called ``name``."""
    try:
        return None if name is None else torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={name!r} is not a device of torch. Give 'cpu', 'cuda', 'cuda:1' …") from error


def parse_floating_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype called ``name``."""
    found = None if name is None else getattr(torch, str(name).removeprefix("torch."), None)
    if name is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={name!r} is not a floating-point dtype. Choose 'float32', 'bfloat16', 'float16' …")
    return found
