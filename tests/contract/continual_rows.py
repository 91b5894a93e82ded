"""The rows of the methods of continual learning: three tasks in one run, whose switches the plugin is told."""

from typing import Any

from contract import continual_checks as checks
from contract import gap_checks
from contract.continual_checks import NEVER
from oracles.replay_twin import SharedReplay
from oracles.shared_twin import SharedEWC, SharedRefreshLearning

from lightning_stable.callbacks import EWC, LAE, L2Anchor, LwF, RefreshLearning, Replay, StabilityGap
from lightning_stable.testing.rows import Settings

_MANUAL = "does not work with manual optimisation"


def _begin_another_task(plugin: Any) -> None:
    plugin.start_task(2)


SETTINGS: dict[str, Settings] = {
    "stability_gap": Settings(
        make=lambda: StabilityGap(loaders=gap_checks.held_out(), **gap_checks.WATCHED),
        oracle=gap_checks.stability_gap,
        ask=_begin_another_task,
        identities=(
            lambda: StabilityGap(loaders=gap_checks.held_out(), **gap_checks.WATCHED),
            lambda: StabilityGap(loaders=gap_checks.held_out(), **gap_checks.LOSS),
        ),
        observer=True,
    ),
    "replay": Settings(
        make=lambda: Replay(**checks.REHEARSED),
        oracle=checks.replay,
        ask=_begin_another_task,
        identities=(lambda: Replay(**{**checks.REHEARSED, "weight": 1.0}),),
        refused_modules={"manual": _MANUAL, "two optimizers": _MANUAL},
        # Each process keeps the samples of both, and replays a share of one draw.
        twin=lambda: SharedReplay(**checks.REHEARSED),
    ),
    "l2_anchor": Settings(
        make=lambda: L2Anchor(**checks.L2),
        oracle=checks.l2_anchor,
        ask=_begin_another_task,
        identities=(
            lambda: L2Anchor(**{**checks.L2, "lam": 0.0}),
            lambda: L2Anchor(**{**checks.L2, "task_steps": NEVER}),
        ),
    ),
    "ewc": Settings(
        make=lambda: EWC(**checks.ELASTIC),
        oracle=checks.ewc,
        ask=_begin_another_task,
        identities=(
            lambda: EWC(**{**checks.ELASTIC, "lam": 0.0}),
            # Keeps samples from the first step on, to be used after the end.
            lambda: EWC(**{**checks.ELASTIC, "task_steps": NEVER}),
        ),
        refused_modules={"manual": _MANUAL, "two optimizers": _MANUAL},
        twin=lambda: SharedEWC(**checks.ELASTIC),
    ),
    "lwf": Settings(
        make=lambda: LwF(**checks.DISTILLED),
        oracle=checks.lwf,
        ask=_begin_another_task,
        identities=(
            lambda: LwF(**{**checks.DISTILLED, "lam": 0.0}),
            lambda: LwF(**{**checks.DISTILLED, "task_steps": NEVER}),
        ),
        refused_modules={"manual": _MANUAL, "two optimizers": _MANUAL},
    ),
    "refresh_learning": Settings(
        make=lambda: RefreshLearning(**checks.REFRESHED),
        oracle=checks.refresh_learning,
        ask=_begin_another_task,
        identities=(lambda: RefreshLearning(**{**checks.REFRESHED, "strength": 0.0}),),
        refused_modules={"manual": _MANUAL, "two optimizers": _MANUAL},
        twin=lambda: SharedRefreshLearning(**checks.REFRESHED),
    ),
    "lae": Settings(
        make=lambda: LAE(**checks.ACCUMULATED),
        oracle=checks.lae,
        ask=_begin_another_task,
        identities=(lambda: LAE(**{**checks.ACCUMULATED, "task_steps": NEVER}),),
    ),
}
