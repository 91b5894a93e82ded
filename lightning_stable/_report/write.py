"""Writes files whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["as_json", "write_atomically"]


def write_atomically(path: Path, content: str) -> None:
    """Write a file whole or not at all: a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def as_json(record: dict[str, Any]) -> str:
    """Return a record as JSON, a line for each field; numbers that are not finite become null."""
    lines = (f"{json.dumps(name)}: {json.dumps(_plain(value), allow_nan=False)}" for name, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
