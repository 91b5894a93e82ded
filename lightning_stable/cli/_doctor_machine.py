"""What there is to compute with, and where to write: as torch and the operating system say."""

import importlib
import os
import platform
import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_stable.cli._doctor_findings import Finding, Gpu, Machine, first_line, quietly

__all__ = ["check_machine"]

_GIB = 2**30
# Checkpoints of a small model with its optimizer, several of them.
_ENOUGH_GIB = 1.0


def check_machine(*, torch_works: bool) -> tuple[Machine, list[Finding]]:
    """Return what this machine has, and what there is to say of it.

    Args:
        torch_works: Whether torch can be imported. Without it there are only the processor and the folder.
    """
    findings: list[Finding] = []
    folder = Path.cwd()
    writable, free = _can_write(folder), _free_gib(folder)
    if not writable:
        cure = "work in another folder, or set --trainer.default_root_dir"
        findings.append(Finding("warning", str(folder), "cannot be written to, and runs are kept there", cure))
    elif free is not None and free < _ENOUGH_GIB:
        text = f"has {free:.2f} GiB left, and checkpoints are kept there"
        findings.append(Finding("warning", str(folder), text, "make room, or work in another folder"))
    cores = _usable_cores()
    machine = Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=cores,
        threads=None,
        cuda=None,
        gpus=(),
        mps=False,
        backends={},
        processes={"cpu": cores},
        folder=str(folder),
        writable=writable,
        free_gib=free,
    )
    if torch_works:
        with quietly():
            machine = _with_torch(machine, findings)
    return machine, findings


def _with_torch(machine: Machine, findings: list[Finding]) -> Machine:
    """Return the machine with what torch knows of it."""
    import torch

    gpus = _gpus(torch, findings)
    mps = bool(torch.backends.mps.is_available())
    processes = {"cpu": machine.cores, **({"cuda": len(gpus)} if gpus else {}), **({"mps": 1} if mps else {})}
    return machine._replace(
        threads=torch.get_num_threads(),
        cuda=torch.version.cuda or (torch.version.hip and f"ROCm {torch.version.hip}"),
        gpus=gpus,
        mps=mps,
        backends=_backends(torch, findings),
        processes=processes,
    )


def _gpus(torch: Any, findings: list[Finding]) -> tuple[Gpu, ...]:
    """Return the devices of CUDA or ROCm; a driver that fails is a finding."""
    if torch.version.cuda is None and torch.version.hip is None:
        return ()
    try:
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        built_for = torch.cuda.get_arch_list() if found and torch.version.hip is None else []
    except (RuntimeError, AssertionError) as error:
        text = f"has GPUs that torch cannot use: {first_line(error)}"
        findings.append(Finding("error", "cuda", text, "look at the driver: nvidia-smi"))
        return ()
    if not found and shutil.which("nvidia-smi"):
        text = f"nvidia-smi is there, and torch {torch.__version__} sees no GPU"
        cure = "look at CUDA_VISIBLE_DEVICES and at the driver: nvidia-smi"
        findings.append(Finding("warning", "cuda", text, cure))
    for index, gpu in enumerate(found):
        # Kernels run on later devices of the same generation, and code that is compiled there (compute_) on any.
        same = [name for name in built_for if name.startswith(("compute_", f"sm_{gpu.major}"))]
        if built_for and not same:
            text = f"torch {torch.__version__} has no kernels for GPU {index} ({gpu.name}, sm_{gpu.major}{gpu.minor})"
            findings.append(Finding("error", "cuda", text, "install a build of torch for it: https://pytorch.org"))
    return tuple(Gpu(gpu.name, f"{gpu.major}.{gpu.minor}", round(gpu.total_memory / _GIB, 1)) for gpu in found)


def _backends(torch: Any, findings: list[Finding]) -> dict[str, bool]:
    """Return which back ends of torch.distributed there are; gloo is tried, for a group of one process."""
    dist = torch.distributed
    if not dist.is_available():
        text = f"torch {torch.__version__} is built without it, so that one process is all there is"
        findings.append(Finding("warning", "torch.distributed", text, "install an ordinary build of torch"))
        return {"gloo": False, "nccl": False}
    gloo = bool(dist.is_gloo_available())
    if gloo:
        try:
            dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=10))
        except (RuntimeError, ValueError) as error:
            gloo = False
            text = f"is there and does not start, so that several processes on CPUs do not either: {first_line(error)}"
            cure = "look at the machine's host name, or name a network interface: GLOO_SOCKET_IFNAME=lo for one machine"
            findings.append(Finding("warning", "gloo", text, cure))
    return {"gloo": gloo, "nccl": bool(dist.is_nccl_available())}


def _usable_cores() -> int:
    """Return the cores that this process may use: by the system, and by a container's limit where joblib reads it."""
    try:
        with quietly():
            return int(importlib.import_module("joblib").cpu_count())
    except Exception:  # it comes with scikit-learn, which may be missing or broken: a finding of its own
        return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _free_gib(folder: Path) -> float | None:
    try:
        return round(shutil.disk_usage(folder).free / _GIB, 2)
    except OSError:
        return None
