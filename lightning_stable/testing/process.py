"""What tests leave behind in their process, undone; and what they would print."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["quiet_host", "restored"]


@contextmanager
def restored() -> Iterator[None]:
    """Undo what a distributed strategy does to this process: its group and its environment variables.

    The seed that the host keeps in the environment, from which such strategies seed again, is forgotten before.
    """
    os.environ.pop("PL_GLOBAL_SEED", None)
    before = dict(os.environ)
    try:
        yield
    finally:
        # Not by is_initialized, which a test may have replaced for longer than this lasts.
        if dist.group.WORLD is not None:
            dist.destroy_process_group()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def quiet_host() -> Iterator[None]:
    """Let the host warn, but not tell of each of many fits: that would hide what a contract says."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
