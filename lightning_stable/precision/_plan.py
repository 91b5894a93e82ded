"""What goes along with a fit under a simulated precision, as its settings ask for it."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_stable.precision._bias_search import BiasSearch
from lightning_stable.precision._fading import FadingHelper
from lightning_stable.precision._parts import Part, ResteSchedule
from lightning_stable.precision._teacher import TeacherIntervention

__all__ = ["new_parts"]


def new_parts(owner: str, settings: Mapping[str, Any], forward_context: Callable[[], Any]) -> list[Part]:
    """Return the parts of a fit, biases before what depends on them.

    Args:
        owner: The class that is named in messages.
        settings: The precision's settings by name.
        forward_context: Its context for a forward pass.
    """
    parts: list[Part] = []
    if settings["search_bias"]:
        batches, metric = settings["bias_search_batches"], settings["bias_search_metric"]
        parts.append(BiasSearch(owner, forward_context, batches, metric))
    if settings["estimator"] == "reste":
        parts.append(ResteSchedule(owner))
    if settings["helper_rank"] is not None:
        parts.append(FadingHelper(owner, settings["helper_rank"], settings["helper_phase_steps"]))
    if settings["teacher_modules"]:
        names = ("modules", "steps", "weights", "gradients")
        parts.append(TeacherIntervention(owner, *(settings[f"teacher_{name}"] for name in names)))
    return parts
