"""A small record, as the callback StabilityGap writes them."""

import copy
from typing import Any

_RECORD = {
    "format": 1,
    "score": "accuracy",
    "higher_is_better": True,
    "every_n_steps": 1,
    "windows": [10, 100],
    "tasks": [{"task": 0, "name": "classes 0, 1", "samples": 108}, {"task": 1, "name": "classes 2, 3", "samples": 7}],
    "switches": [{"task": 0, "step": 0}, {"task": 1, "step": 4}],
    "series": {
        "live": [
            {"task": 0, "steps": [0, 2, 4, 5, 6, 7, 8], "scores": [0.5, 0.75, 1.0, 0.25, 0.5, None, 1.0]},
            {"task": 1, "steps": [0, 4, 6, 8], "scores": [0.125, 0.0, 0.5, 0.875]},
        ],
        "ema": [{"task": 0, "steps": [4, 5, 6, 8], "scores": [0.875, 0.75, 0.875, 1]}],
    },
    "summary": {
        "live": [
            {"task": 0, "step": 4, "average_accuracy": 1.0, "forgetting": None, "windowed_forgetting_10": 0},
            {
                "task": 1,
                "step": 8,
                "average_accuracy": 0.9375,
                "forgetting": -0.0001,
                "min_accuracy": 0.25,
                "worst_case_accuracy": 0.5625,
                "windowed_forgetting_10": 0.75,
                "windowed_forgetting_100": 0.75,
                "windowed_plasticity_10": 0.875,
                "windowed_plasticity_100": 0.875,
                "gap_depth": 0.75,
                "gap_recovery": 4.0,
                "gap_recovered": 1.0,
            },
        ],
        "ema": [{"task": 1, "step": 8, "average_accuracy": None}],
    },
    "gradients": {"steps": [4, 6], "plasticity": [17.6, 2.0], "stability": [0.13, None], "cosine": [-0.2, None]},
}


def make_record(**changes: Any) -> dict[str, Any]:
    """Return the record with some fields changed."""
    return {**copy.deepcopy(_RECORD), **changes}
