"""What ``lightning-stable doctor`` finds, as plain values that a page and a script can be made of."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

__all__ = ["Diagnosis", "Finding", "Gpu", "Machine", "MethodCheck", "Package", "first_line", "quietly"]

Level = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One thing to know.

    Attributes:
        level: An error is something needed that is broken or known bad; a warning something that cannot be had here;
            a note something that can be had by an install.
        subject: What it is about: a package, a method, a folder.
        text: What is the matter.
        cure: What to do; empty if there is nothing to do.
    """

    level: Level
    subject: str
    text: str
    cure: str = ""


class Package(NamedTuple):
    """A package that the installed distribution declares.

    Attributes:
        name: Its name at the package index.
        installed: The version that is installed; ``None`` if it is missing.
        needed: The range that is declared; empty for any version.
        extra: The extra that has it; empty if it is always needed.
        status: ``"ok"``, ``"missing"``, ``"outside"`` the range, known to be ``"bad"``, or ``"broken"``: it does not
            import.
    """

    name: str
    installed: str | None
    needed: str
    extra: str
    status: Literal["ok", "missing", "outside", "bad", "broken"]


class Gpu(NamedTuple):
    """One CUDA (or ROCm) device: its name, compute capability and memory in GiB."""

    name: str
    capability: str
    memory_gib: float


class Machine(NamedTuple):
    """What there is to compute with, and where to write.

    Attributes:
        system: The operating system and its machine type.
        python: The version of the interpreter.
        cores: CPU cores that this process may use.
        threads: Threads that torch takes; ``None`` without torch.
        cuda: The version of CUDA (or ROCm) that torch was built for; ``None`` for a build without.
        gpus: The devices of CUDA (or ROCm).
        mps: Whether there is an Apple GPU that torch can use.
        backends: The back ends of torch.distributed that were asked for, and whether each works.
        processes: How many processes a Trainer can start here for each accelerator, one device each.
        folder: The working directory.
        writable: Whether files can be written there.
        free_gib: The space that is left there; ``None`` if it cannot be told.
    """

    system: str
    python: str
    cores: int
    threads: int | None
    cuda: str | None
    gpus: tuple[Gpu, ...]
    mps: bool
    backends: dict[str, bool]
    processes: dict[str, int]
    folder: str
    writable: bool
    free_gib: float | None


class MethodCheck(NamedTuple):
    """Whether a method can run here.

    Attributes:
        name: Its name.
        kind: What it plugs into.
        runs: ``"yes"``, ``"limited"`` if something of it is missing, or ``"no"``.
        why: What it runs on, or what is in the way.
        source: The distribution that adds it and its version; empty for this library.
    """

    name: str
    kind: str
    runs: Literal["yes", "limited", "no"]
    why: str = ""
    source: str = ""


class Diagnosis(NamedTuple):
    """Everything that was looked at."""

    packages: tuple[Package, ...]
    machine: Machine
    methods: tuple[MethodCheck, ...]
    findings: tuple[Finding, ...]

    def exit_code(self, *, strict: bool = False) -> int:
        """Return 1 if there is an error, with ``strict`` also if there is a warning, else 0."""
        counted = ("error", "warning") if strict else ("error",)
        return int(any(finding.level in counted for finding in self.findings))


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line with its type where that says more."""
    text = " ".join(str(error).split("\n\n", 1)[0].split())
    return text if isinstance(error, ImportError | ValueError) and text else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Import and try things without what they print, log or warn of, which is no finding."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
