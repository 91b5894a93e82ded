"""The set-ups of a simulated precision that go by a name: apart, since the command reads them without torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "PROJECTIONS"]

# The projections of a transformer's blocks, by the names that they have in Llama-like models.
PROJECTIONS = tuple(f"*{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))

_STABLE_SPAM_INT4 = {
    "weights": "int4",
    "activations": "int4",
    "gradients": None,
    "scaling": "group:256",
    "asymmetric_weights": True,
    "keep_outliers": 2,
}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"stable_spam_int4": MappingProxyType(_STABLE_SPAM_INT4)})
