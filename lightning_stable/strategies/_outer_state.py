"""The state of an outer step between a run and a checkpoint."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_stable.strategies._progress import Progress
from lightning_stable.strategies._rounds import Rounds

__all__ = ["outer_state_dict", "restore"]


def outer_state_dict(state: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a state, its flat tensors without what only fills them up.

    Args:
        state: A NamedTuple of tensors and lists of flat tensors.
        lengths: How much of each flat tensor is in use.
    """
    return {name: _trimmed(value, lengths) for name, value in state._asdict().items()}


def restore(loaded: dict[str, Any] | None, progress: Progress, rounds: Rounds, owner: str) -> None:
    """Go on from what a checkpoint holds of a strategy.

    Args:
        loaded: Its state; ``None`` without a checkpoint, empty where it has none of this strategy.
        progress: Where the run stands.
        rounds: The rounds, just begun.
        owner: Name of the strategy, for warnings.
    """
    if loaded:
        progress.load_state_dict(loaded)
        rounds.state = _restore_outer(rounds.state, loaded["outer"], rounds.lengths, owner)
    elif loaded is not None:
        rank_zero_warn(
            f"{owner}: the checkpoint was saved by another strategy, or by one worker. Warm-up, rounds and the outer "
            "step begin anew."
        )


def _restore_outer(fresh: Any, saved: dict[str, Any], lengths: Sequence[int], owner: str) -> Any:
    """Return a state with what was saved, on the devices of a fresh one.

    Args:
        fresh: A state that has just begun, a NamedTuple of tensors and lists of tensors.
        saved: Its fields, as they were saved.
        lengths: How much of each flat tensor is in use.
        owner: Name of the strategy, for the warning about what does not fit.
    """
    fields = {}
    for name, value in fresh._asdict().items():
        used = _trimmed(value, lengths)
        if _shapes(saved.get(name)) == _shapes(used):
            _fill(used, saved[name])
            fields[name] = value
        else:
            rank_zero_warn(
                f"{owner}: the checkpoint's outer {name} was saved under other settings and does not fit; it begins "
                "anew."
            )
    return fresh._replace(**fields)


def _shapes(value: Any) -> Any:
    return [_shapes(part) for part in value] if isinstance(value, list) else getattr(value, "shape", None)


def _trimmed(value: Any, lengths: Sequence[int]) -> Any:
    if isinstance(value, list):
        return [flat[:length] for flat, length in zip(value, lengths, strict=False)]
    return value


def _fill(parts: Any, saved: Any) -> None:
    if isinstance(parts, list):
        for part, values in zip(parts, saved, strict=True):
            part.copy_(values)
    else:
        parts.copy_(saved)
