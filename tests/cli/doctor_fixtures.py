"""A machine, and GPUs that torch sees, for the tests of ``doctor``."""

from types import SimpleNamespace

import torch

from lightning_stable.cli._doctor_findings import Machine

__all__ = ["CPU", "fake_torch", "named"]

CPU = Machine(
    system="Linux x86_64",
    python="3.11.7",
    cores=2,
    threads=1,
    cuda=None,
    gpus=(),
    mps=False,
    backends={"gloo": True, "nccl": False},
    processes={"cpu": 2},
    folder="/somewhere",
    writable=True,
    free_gib=5.0,
)


def named(found, name):
    (entry,) = [entry for entry in found if name in (getattr(entry, "name", ""), getattr(entry, "subject", ""))]
    return entry


def fake_torch(monkeypatch, arches, *gpus, cuda="13.0"):
    """Makes torch see GPUs, as (name, major, minor)."""
    found = [SimpleNamespace(name=n, major=a, minor=b, total_memory=80 * 2**30) for n, a, b in gpus]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arches)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found[device.index].name)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (found[device.index].major, found[device.index].minor)
    )
