"""Two network namespaces joined by a limited link: two machines with a slow line between them, on one machine.

Each end is a virtual Ethernet device whose outgoing traffic passes a token bucket (``tc tbf``), so that both directions
have the rate. It needs root and iproute2 (``ip`` and ``tc``). The namespaces are named after the process that made them
and go when it ends, also after an error, Ctrl-C or a termination signal; what a killed process left is removed by the
next one.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

__all__ = ["Link", "problem"]

_PREFIX = "lightning-stable"
_MTU_BURST = 16_000  # bytes; ten full packets


def problem() -> str | None:
    """Return why namespaces cannot be used here, in words for the user, or None if they can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    try:
        with Link():
            pass
    except RuntimeError as error:
        return f"this system refuses network namespaces or tbf, as containers without CAP_NET_ADMIN do: {error}"
    return None


class Link:
    """Two namespaces and the link between them, for the length of a ``with`` block.

    Attributes:
        names: Names of the two namespaces.
        addresses: IPv4 address of each end.
        devices: Name of the network device in each namespace.
    """

    def __init__(self) -> None:
        self.names = [f"{_PREFIX}-{os.getpid()}-{end}" for end in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.devices = ["link0", "link1"]
        self._handler: object = None

    def __enter__(self) -> Self:
        _remove_left_behind()
        self._handler = signal.signal(signal.SIGTERM, _terminate)
        try:
            for name in self.names:
                _call("ip", "netns", "add", name)
            ends = [["name", d, "netns", n] for d, n in zip(self.devices, self.names, strict=True)]
            _call("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
                _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
                for each in ("lo", device):
                    _call("ip", "-n", name, "link", "set", each, "up")
            self.limit(1000)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def limit(self, megabits: float) -> None:
        """Limit both directions.

        Args:
            megabits: Rate in 10^6 bits a second.
        """
        # A millisecond's worth: the kernel cannot pace finer, and more would let a short transfer go for free.
        burst = max(_MTU_BURST, int(megabits * 1e6 / 8 / 1000))
        for name, device in zip(self.names, self.devices, strict=True):
            rate = ["rate", f"{megabits}mbit", "burst", str(burst), "latency", "100ms"]
            _call("tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", *rate)

    def command(self, end: int) -> list[str]:
        """Return what to write before a command to run it at an end of the link."""
        return ["ip", "netns", "exec", self.names[end]]

    def _remove(self) -> None:
        for name in self.names:
            # What was never made cannot be removed; the error that is on its way says why.
            _call("ip", "netns", "delete", name, check=False)
        signal.signal(signal.SIGTERM, self._handler)  # type: ignore[arg-type] # as it was


def _terminate(*_: object) -> None:
    """End with an exception, so that ``with`` blocks are left."""
    raise SystemExit(128 + signal.SIGTERM)


def _remove_left_behind() -> None:
    """Remove the namespaces of processes that are no more."""
    for line in _call("ip", "netns", "list").splitlines():
        found = re.match(rf"({_PREFIX}-(\d+)-\d)\b", line)
        if found and not Path(f"/proc/{found[2]}").exists():
            _call("ip", "netns", "delete", found[1], check=False)


def _call(*command: str, check: bool = True) -> str:
    tool = shutil.which(command[0]) or command[0]
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
