"""Which weights a validation measured: those that train, or their average."""

import re
from collections.abc import Sequence

from lightning_stable._report.run import LIVE, Run
from lightning_stable._report.settings import callbacks_in

__all__ = ["AVERAGED", "LIVE_WEIGHTS", "may_average", "validated_weights", "weights_that_differ"]

AVERAGED, LIVE_WEIGHTS = "averaged weights", "live weights"

# Callbacks that validate an average, unless their ``validate_with`` says otherwise.
_OURS = ("EMA", "BalancedEMA")
_HOSTS = ("WeightAveraging", "EMAWeightAveraging")
# Names that callbacks of others have where the weights may be an average.
_MAY_AVERAGE = re.compile("E(MA|ma)|Averag|S(WA|wa)|Lookahead")


def validated_weights(run: Run, name: str) -> str:
    """Return which weights a validated value is of, empty where no file says so.

    Args:
        run: The run.
        name: The value.
    """
    if name.endswith(LIVE) and name.removesuffix(LIVE) in run.series:
        return LIVE_WEIGHTS
    if name + LIVE in run.series:
        return AVERAGED
    recorded = run.record.get("validated_weights")
    if recorded is not None:
        return {"average": AVERAGED, "live": LIVE_WEIGHTS}.get(recorded, "")
    return _by_config(run)


def weights_that_differ(runs: Sequence[Run], name: str) -> dict[str, str]:
    """Return the weights by the run's name where those of several runs are not the same; nothing where they are."""
    known = {run.name: validated_weights(run, name) for run in runs if name in run.series}
    return {of: weights or "unknown weights" for of, weights in known.items()} if len(set(known.values())) > 1 else {}


def may_average(name: str) -> bool:
    """Tell whether a callback of others may put an average in place of the weights, by its class."""
    return _MAY_AVERAGE.search(name) is not None


def _by_config(run: Run) -> str:
    if not run.config:
        return ""
    found = set()
    for callback in callbacks_in(run.config):
        path, given = str(callback.get("class_path", "")), callback.get("init_args") or {}
        name = path.rpartition(".")[2]
        if name in _OURS and path.startswith("lightning_stable."):
            live = isinstance(given, dict) and given.get("validate_with") == "live"
            found.add(LIVE_WEIGHTS if live else AVERAGED)
        elif name in _HOSTS:
            found.add(AVERAGED)
        elif may_average(name):
            found.add("")
    return found.pop() if len(found) == 1 else "" if found else LIVE_WEIGHTS
