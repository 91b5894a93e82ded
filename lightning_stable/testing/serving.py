"""Processes that answer jobs until their pipe closes, each in the place where torchrun would have put it.

They are forked off a server that has imported torch, the host and the contracts: a start takes a moment, where every
fresh interpreter would import for seconds. The server itself runs no job and has no threads.
"""

import importlib
import io
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

__all__ = ["Place", "fork", "free_port", "launch", "preload", "received"]

Place = dict[str, str]
"""What torchrun would set in the environment of one process."""

_PRELOADED = ["lightning_stable.testing.preloaded"]


def preload(module: str) -> None:
    """Let the server import this module, too, before it forks; a module that starts no threads.

    It says so in the tests that need it if something cannot be imported: here that would end the server of all.
    """
    if module not in _PRELOADED:
        _PRELOADED.append(module)


def free_port() -> str:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(places: Sequence[Place]) -> list[tuple[Any, Connection]]:
    """Start a process in each place, and return it with the pipe that takes jobs and gives answers."""
    context = _server()
    started = []
    for place in places:
        ours, theirs = context.Pipe()
        # What this process has in its environment by now, and not what the server began with.
        process = context.Process(target=_serve, args=(theirs, {**os.environ, **place}), daemon=True)
        process.start()
        # Closed here, so that the end of the process closes the pipe.
        theirs.close()
        started.append((process, ours))
    return started


def fork(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process off the server that does one thing and ends; return it.

    Args:
        target: A function that the process can import.
        *arguments: What it is called with.
    """
    process = _server().Process(target=_call, args=(dict(os.environ), target, arguments))
    process.start()
    return process


def _call(environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)


def received(pipe: Connection) -> tuple[str, Any]:
    """Return an answer: ``"done"`` with the value, ``"asserted"`` or ``"failed"`` with a traceback, or ``"died"``."""
    try:
        outcome, content = pipe.recv()
    except (EOFError, ConnectionError):
        return "died", None
    return outcome, torch.load(io.BytesIO(content), weights_only=False) if outcome == "done" else content


def _server() -> Any:
    """Start the server if there is none, and return what starts processes off it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # Older Pythons do not tell it where modules are.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Answer jobs, functions named ``module:function``, until the pipe closes."""
    os.environ.clear()
    os.environ.update(environment)
    # The host reads it when it is imported, which the server has done.
    vars(rank_zero_only)["rank"] = int(environment["RANK"])
    torch.set_num_threads(1)
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            module, _, name = job.partition(":")
            content = io.BytesIO()
            torch.save(getattr(importlib.import_module(module), name)(**arguments), content)
            pipe.send(("done", content.getvalue()))
        except AssertionError:
            pipe.send(("asserted", traceback.format_exc()))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
