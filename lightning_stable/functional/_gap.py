"""How deep the scores of past tasks fall after a switch of task, and how soon they come back."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Gap", "GapTrack", "begin_gaps", "gap_summary", "pack_gaps", "record_gaps", "unpack_gaps"]


@dataclass
class Gap:
    """One past task since the last switch.

    Attributes:
        task: The task.
        reference: Its score at the switch, higher being better.
        lowest: Its lowest score since, at most the reference.
        recovery: Steps from the switch to the first score after the lowest one that made up for enough of the fall.
    """

    task: int
    reference: float
    lowest: float
    recovery: int | None = None


@dataclass
class GapTrack:
    """The gaps since the last switch, and the sums over those of earlier switches.

    Attributes:
        began: When the last switch was, in steps.
        gaps: One entry for each past task since then.
        pairs: Pairs of a switch and a past task, over the earlier switches.
        depth: Sum of their depths.
        fallen: How many of them have a depth above 0.
        recovered: How many of those recovered.
        steps: Sum of the steps to recovery.
    """

    began: int = 0
    gaps: list[Gap] = field(default_factory=list)
    pairs: int = 0
    depth: float = 0.0
    fallen: int = 0
    recovered: int = 0
    steps: int = 0


def begin_gaps(track: GapTrack, references: Mapping[int, float], now: int) -> None:
    """Begin the gaps of a switch, in place.

    Args:
        track: The gaps so far.
        references: The score at the switch of each past task, higher being better.
        now: The step of the switch.
    """
    track.pairs, track.depth, track.fallen, track.recovered, track.steps = _totals(track)
    track.began = now
    track.gaps = [Gap(task, score, score) for task, score in references.items()]


def record_gaps(track: GapTrack, scores: Mapping[int, float], now: int, share: float) -> None:
    """Take one evaluation after a switch into its gaps, in place.

    Args:
        track: The gaps so far.
        scores: The score of each evaluated task, higher being better.
        now: The step of the evaluation.
        share: Which share of the fall has to be made up for to count as recovered.
    """
    for gap in track.gaps:
        score = scores.get(gap.task)
        if score is None:
            continue
        if score < gap.lowest:
            gap.lowest, gap.recovery = score, None
        elif gap.recovery is None and gap.lowest < gap.reference:
            # Rounding may put the goal above the reference itself when the share is 1.
            goal = min(gap.lowest + share * (gap.reference - gap.lowest), gap.reference)
            if score >= goal:
                gap.recovery = now - track.began


def gap_summary(track: GapTrack) -> dict[str, float]:
    """Return depth, steps to recovery and the share that recovered, over all switches; not-a-number where undefined."""
    pairs, depth, fallen, recovered, steps = _totals(track)
    return {
        "gap_depth": depth / pairs if pairs else math.nan,
        "gap_recovery": steps / recovered if recovered else math.nan,
        "gap_recovered": recovered / fallen if fallen else math.nan,
    }


def pack_gaps(track: GapTrack) -> dict[str, Any]:
    """Return the gaps as numbers, lists and dictionaries."""
    return asdict(track)


def unpack_gaps(packed: dict[str, Any]) -> GapTrack:
    """Return the gaps that :func:`pack_gaps` was given."""
    return GapTrack(**{**packed, "gaps": [Gap(**gap) for gap in packed["gaps"]]})


def _totals(track: GapTrack) -> tuple[int, float, int, int, int]:
    """Return the sums over all switches, the last one included."""
    depths = [gap.reference - gap.lowest for gap in track.gaps]
    recoveries = [gap.recovery for gap in track.gaps if gap.recovery is not None]
    return (
        track.pairs + len(depths),
        track.depth + sum(depths),
        track.fallen + sum(depth > 0 for depth in depths),
        track.recovered + len(recoveries),
        track.steps + sum(recoveries),
    )
