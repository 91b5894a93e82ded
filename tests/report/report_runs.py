"""Folders of runs for the tests of the report: written by hand, as loggers and callbacks write them."""

import json
import math
from pathlib import Path

HEAD = ["epoch", "step", "train_loss", "lr-SGD", "val_loss", "val_loss_live", "val_accuracy", "wsd/phase"]


def losses(steps=300, spikes=(200,)):
    """A loss that falls from 3 to 1 with some noise, and is 9 at the spikes."""
    values = [1 + 2 * math.exp(-step / 40) + 0.03 * math.sin(12.9 * step * step) for step in range(steps)]
    return [9.0 if step in spikes else value for step, value in enumerate(values)]


def write_csv(folder: Path, rows: list[dict], head=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = head or list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    path = folder / "metrics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_run(folder: Path, steps=300, spikes=(200,), **settings) -> Path:
    """Write what a CSVLogger and the command leave of a run."""
    rows = []
    for step, loss in enumerate(losses(steps, spikes)):
        rate, phase = (0.1 * step / 30, 0) if step < 30 else (0.1, 1) if step < 240 else (0.01, 2)
        rows.append({"epoch": step // 100, "step": step, "train_loss": loss, "lr-SGD": rate, "wsd/phase": phase})
        if (step + 1) % 50 == 0:
            accuracy = 1 - 1 / (step + 2)
            rows.append({"step": step, "val_loss": loss, "val_loss_live": loss + 0.1, "val_accuracy": accuracy})
    write_csv(folder, rows, HEAD)
    config = {"trainer": {"max_steps": steps, "callbacks": [{"class_path": "a.EMA", "init_args": {"decay": 0.9}}]}}
    config["model"] = {"class_path": "a.b.Net", "init_args": {"lr": 0.1, **settings}}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def write_gap(folder: Path) -> None:
    steps = list(range(0, 41, 2))
    first = [min(1.0, 0.1 * step) if step < 20 else 0.2 + 0.04 * (step - 20) for step in steps]
    second = [None if step == 30 else 0.05 * (step - 20) for step in steps[10:]]
    series = [{"task": 0, "steps": steps, "scores": first}, {"task": 1, "steps": steps[10:], "scores": second}]
    summary = {"task": 1, "step": 40, "average_accuracy": 0.9, "forgetting": 0.1, "gap_depth": 0.8, "gap_recovery": 18}
    record = {
        "format": 1,
        "score": "accuracy",
        "higher_is_better": True,
        "tasks": [{"task": 0, "name": "classes 0, 1", "samples": 9}, {"task": 1, "name": "classes 2, 3", "samples": 9}],
        "switches": [{"task": 0, "step": 0}, {"task": 1, "step": 20}],
        "series": {"live": series, "ema": series},
        "summary": {"live": [summary], "ema": [{**summary, "gap_recovery": None}]},
    }
    (folder / "stability_gap.json").write_text(json.dumps(record))


def write_numerics(folder: Path, reports=5) -> None:
    lines = []
    for number in range(reports):
        layers = {
            f"net.{layer}": {
                operand: {"format": "e4m3", "underflow": 0.01 * layer, "saturation": 0.0, "sqnr": 30.0, "absmax": 1.0}
                for operand in ("weights", "gradients")
            }
            for layer in range(3)
        }
        lines.append(json.dumps({"step": 10 * (number + 1), "layers": layers}))
    (folder / "numerics.jsonl").write_text("\n".join(lines) + '\n{"step": 60, "lay')


def record_of(steps=300, **more) -> dict:
    """What StabilityReport writes, in short."""
    values = losses(steps)
    return {
        "format": 1,
        "steps": steps,
        "epochs": 3,
        "seconds": 75.0,
        "rule": {"threshold": 6.0, "window": 128, "gained": 0.05},
        "spikes": {"loss": [[201, 9.0, 1.2]], "gradient_norm": []},
        "not_finite": {"loss": [0, None], "gradient_norm": [0, None]},
        "phases": [[1, "warmup"], [31, "stable"]],
        "rounds": [50, 100, 150],
        "strategy": {"name": "CO2Strategy", "local_steps": 50, "delayed": True},
        "environment": {"torch": "2.13.0", "device": "cpu (some)"},
        "model": {"class": "Net", "parameters": 1000, "trained": 100, "adapter_ranks": {"a": 4, "b": 8}},
        "events": [{"step": 12, "what": "PrecisionFallback: high precision (loss)"}],
        "metrics": {"val_loss": [[50, 1.5], [100, None], [150, 1.2]]},
        "series": {
            "step": list(range(1, steps + 1)),
            "optimizer": [0] * steps,
            "loss": values,
            "gradient_norm": [1.0 + 0.01 * (step % 7) for step in range(steps)],
            "seconds": [0.25 * step + 0.05 * (step // 50) for step in range(steps)],
            "lr": [[0.1, 0.01]] * steps,
        },
        **more,
    }


def write_record(folder: Path, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stability_report.json").write_text(json.dumps(record_of(**more)))
