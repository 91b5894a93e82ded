"""Reads the event files of TensorBoard, where tensorboard is installed."""

import logging
from importlib import import_module
from pathlib import Path

from lightning_stable._report.run import Run, append

__all__ = ["EVENTS", "read_events"]

EVENTS = "events.out.tfevents.*"
_NEWEST_FIRST = {"images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}


def read_events(folder: Path, run: Run) -> None:
    """Add the scalars of a folder's event files to a run, those that it does not have yet."""
    files = sorted(file.name for file in folder.glob(EVENTS))
    if not files:
        return
    try:
        reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    except ImportError:
        run.notes.append(
            f"{len(files)} event file{'s' if len(files) > 1 else ''} of TensorBoard could not be read, since "
            "tensorboard is missing. Get it by: pip install 'lightning-stable[tensorboard]'"
        )
        return
    log = logging.getLogger("tensorboard")
    level = log.level
    log.setLevel(logging.CRITICAL)  # of files that a crash has cut it reads what there is
    try:
        events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, **_NEWEST_FIRST}).Reload()
        names = [name for name in events.Tags()["scalars"] if name != "hp_metric"]
        times: list[float] = []
        for name in names:
            found = events.Scalars(name)
            times += [event.wall_time for event in found]
            if name in run.series:
                continue
            for event in found:
                append(run.series.setdefault(name, []), int(event.step) + 1, float(event.value))
    except Exception as error:
        run.notes.append(f"Event files of TensorBoard could not be read: {type(error).__name__}: {error}")
        return
    finally:
        log.setLevel(level)
    if not names:
        run.notes.append("The event files of TensorBoard hold no values.")
    if times and run.seconds is None:
        run.seconds = max(times) - min(times)
    run.sources += files
