"""Settings that a strategy passes on to torch's DDP, told apart before they get there."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch.nn.parallel import DistributedDataParallel

__all__ = ["changed_ddp_settings", "check_ddp_settings"]

# What the host's strategy takes besides the arguments of torch's DDP.
_OF_THE_HOST = {
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision_plugin",
    "process_group_backend",
    "timeout",
    "start_method",
}
_OTHER_EXCHANGES = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period", "process_group")


def check_ddp_settings(owner: str, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for settings that say how, or among whom, is exchanged, and for those that do not exist."""
    other = [name for name in _OTHER_EXCHANGES if settings.get(name) is not None]
    if other:
        raise ValueError(
            f"{owner} makes the exchange itself, in process groups of its own choice, and cannot take "
            f"{', '.join(other)}: leave them out."
        )
    unknown = sorted(settings.keys() - _defaults().keys() - {*_OF_THE_HOST, *_OTHER_EXCHANGES})
    if unknown:
        raise ValueError(f"{owner} has no setting called {', '.join(unknown)}. Check the spelling.")


def changed_ddp_settings(settings: Mapping[str, Any]) -> list[str]:
    """Return which settings are arguments of torch's DDP that ask for something: a config names all at defaults."""
    defaults = _defaults()
    return sorted(name for name in settings if name in defaults and settings[name] != defaults[name])


def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(DistributedDataParallel).parameters
    return {name: value.default for name, value in parameters.items() if name != "module"}
