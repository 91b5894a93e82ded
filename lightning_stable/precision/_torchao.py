"""What the precision plugins on torchao share: torchao found and imported quietly, layers switched, steps counted."""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from packaging.version import Version
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.precision._host import COMPUTE, host_precision
from lightning_stable.precision._torchao_layers import Choice, LayerSwitch, Sample, choose_layers, probe

__all__ = ["TorchaoPrecision", "check_cuda"]

_OLDEST = "0.18.0"
# torchao declares none, and with an older one its import fails without a word about versions.
_OLDEST_TORCH = "2.11"
_INSTALL = 'pip install "lightning-stable[torchao]"'
_MOST_NAMES = 10
# What torchao's import logs where there is no GPU, or about torch: of no use to anybody who trains.
_NOISE = {"torchao": "Failed to load", "torch.utils._pytree": "KernelPreference"}


class TorchaoPrecision(Precision, ABC):
    """Base of precision plugins whose linear layers compute through torchao.

    Layers are converted when a fit, a validation, a test or a prediction begins, and are what they were when it is
    over, also after an exception.

    Args:
        include: Patterns of names of linear layers, as of file names; each has to match one.
        exclude: Patterns of names of layers that stay in high precision all the same.
        width_multiple: Layers whose two widths are not both multiples of it stay in high precision. GPUs need 16.
        first_steps_high_precision: Optimizer steps, counted as ``trainer.global_step``, before the layers are
            converted.
        compute: What everything else computes in: "32-true", "bf16-true" or "bf16-mixed". In the first and the last
            the weights that are trained are in float32.

    Raises:
        ImportError: If torchao is missing, or it or torch is too old.
        ValueError: If a setting is not allowed.
    """

    def __init__(
        self,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("*head*",),
        width_multiple: int = 16,
        first_steps_high_precision: int = 0,
        compute: str = "32-true",
    ) -> None:
        check_choice("compute", compute, COMPUTE)
        check_count("width_multiple", width_multiple, 1, "features")
        check_count("first_steps_high_precision", first_steps_high_precision, 0, "optimizer steps")
        _require_torchao(type(self).__name__)
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self.width_multiple = width_multiple
        self.first_steps_high_precision = first_steps_high_precision
        self.compute = compute
        self.precision = cast(Any, compute)
        self._host = host_precision(compute)
        self._trainer: Trainer | None = None
        self._device = torch.device("cpu")
        self._sample: Sample | None = None
        self._choice = Choice({}, {})
        self._switches: list[LayerSwitch] = []
        # Not known before a fit or a checkpoint.
        self._steps: int | None = None
        self._told: set[str] = set()

    # ------------------------------------------------------------------------------------------ what differs

    @abstractmethod
    def _check_device(self, device: torch.device) -> None:
        """Raise ``ValueError`` for a device whose kernels cannot compute this."""

    @abstractmethod
    def _convert_sample(self, layer: nn.Module, device: torch.device) -> Sample:
        """Return what torchao makes of the one linear layer in ``layer`` for a device."""

    @abstractmethod
    def _format(self, device: torch.device) -> str:
        """Return in words what converted layers compute in."""

    # ------------------------------------------------------------------------------------------ hooks of the host

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self._host.module_init_context()

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Prepare the layers of ``module`` in place; strategies of several processes ignore what is returned."""
        self._restore()
        trainer = cast(LightningModule, module).trainer
        _check_strategy(type(self).__name__, trainer)
        self._device = trainer.strategy.root_device
        self._check_device(self._device)
        self._choice = choose_layers(type(self).__name__, module, self.include, self.exclude, self.width_multiple)
        self._host = host_precision(self.compute, self._device.type)
        module = self._host.convert_module(module)
        # Without drawing from the random numbers of training.
        layer = nn.Sequential(nn.Linear(16, 16, device="meta")).to_empty(device="cpu")
        with _quietly():
            self._sample = sample = self._convert_sample(layer, self._device)
        self._switches = [LayerSwitch(layer, sample) for layer in self._choice.layers.values()]
        self._trainer = trainer
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check the layers, which are on their device by now, and switch them on unless first steps come before."""
        if self._sample is not None:
            for name, layer in self._choice.layers.items():
                probe(type(self).__name__, name, layer, self._sample)
            self._tell()
            self._turn()
        return super().connect(model, optimizers, lr_schedulers)

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._host.tensor_init_context()

    @override
    def convert_input(self, data: Any) -> Any:
        return self._host.convert_input(data)

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Compute as the steps made so far say: the context of training, validation, test and prediction steps."""
        self._turn()
        with self._host.forward_context():
            yield

    @override
    def state_dict(self) -> dict[str, Any]:
        steps = self._steps_made()
        return {"steps": steps} if self.first_steps_high_precision and steps is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict.get("steps")

    @override
    def teardown(self) -> None:
        self._restore()

    # ------------------------------------------------------------------------------------------ steps and layers

    def _steps_made(self) -> int | None:
        """Return how many optimizer steps the weights have seen; ``None`` if nothing says so."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            return self._trainer.global_step
        return self._steps

    def _turn(self) -> None:
        steps = self._steps_made()
        on = steps is None or steps >= self.first_steps_high_precision
        for switch in self._switches:
            switch.turn(on)

    def _restore(self) -> None:
        """Make the layers what they were, and forget them."""
        self._steps = self._steps_made()
        for switch in self._switches:
            switch.turn(False)
        self._switches, self._choice, self._sample, self._trainer = [], Choice({}, {}), None, None

    def _tell(self) -> None:
        """Say in one line what is converted, once for each thing there is to say."""
        layers, left_out = self._choice
        rest = [f"{name} ({reason})" for name, reason in list(left_out.items())[:_MOST_NAMES]]
        rest += [f"{len(left_out) - _MOST_NAMES} more"] if len(left_out) > _MOST_NAMES else []
        line = (
            f"{type(self).__name__}: {len(layers)} of {len(layers) + len(left_out)} linear layers compute in "
            f"{self._format(self._device)}"
            + (f" after {self.first_steps_high_precision} steps" if self.first_steps_high_precision else "")
            + (f". Left out: {', '.join(rest)}." if rest else ".")
        )
        if line not in self._told:
            self._told.add(line)
            rank_zero_info(line)


def check_cuda(owner: str, device: torch.device, lowest: tuple[int, int], numbers: str, *also: str) -> None:
    """Raise ``ValueError`` unless a device is a GPU with tensor cores for such numbers; AMD's are not judged."""
    other = ", ".join(["Use SimulatedPrecision, which computes such formats on any device", *also])
    needed = f"{owner} needs a GPU of compute capability {lowest[0]}.{lowest[1]} or higher for {numbers}"
    if device.type != "cuda":
        raise ValueError(f"{needed}, and trains on {device}. {other}.")
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < lowest:
        raise ValueError(
            f"{needed}; {device} ({torch.cuda.get_device_name(device)}) has {found[0]}.{found[1]}. {other}."
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Drop the lines of :data:`_NOISE`, where there is no GPU that they could be about."""

    def speaks(record: logging.LogRecord) -> bool:
        return _NOISE[record.name] not in record.getMessage()

    loggers = [] if torch.cuda.is_available() else [logging.getLogger(name) for name in _NOISE]
    for logger in loggers:
        logger.addFilter(speaks)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(speaks)


def _require_torchao(owner: str) -> None:
    """Raise ``ImportError`` unless torchao is there, and it and torch are new enough; it is not imported yet."""
    try:
        found = version("torchao")
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"{owner} needs torchao {_OLDEST} or newer: {_INSTALL}") from None
    if Version(found) < Version(_OLDEST):
        raise ImportError(f"{owner} needs torchao {_OLDEST} or newer, and {found} is installed: {_INSTALL}")
    beneath = version("torch")
    # Builds of a version before its release count as it: NVIDIA's containers have them.
    if Version(Version(beneath).base_version) < Version(_OLDEST_TORCH):
        raise ImportError(
            f"{owner} needs torch {_OLDEST_TORCH} or newer, for torchao {found}, and {beneath} is installed: "
            f'pip install "torch>={_OLDEST_TORCH}", or use SimulatedPrecision, which works with any torch'
        )


def _check_strategy(owner: str, trainer: Trainer) -> None:
    """Raise ``ValueError`` for a strategy that trains by itself or splits layers; the host refuses FSDP1 and XLA."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(  # noqa: TRY004  a combination that does not fit, not a wrong type
            f"{owner} does not work with {name}, whose engine needs the host's own DeepSpeedPrecision. Use one device, "
            "DDPStrategy, or ModelParallelStrategy with fully_shard (FSDP2)."
        )
    if isinstance(strategy, ModelParallelStrategy) and (parts := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"{owner} does not work with tensor_parallel_size={parts}: tensor parallelism splits single layers. Set "
            f"{name}(tensor_parallel_size=1) and shard whole layers by fully_shard in configure_model."
        )


def _patterns(name: str, value: Sequence[str]) -> list[str]:
    """Return patterns of names as a list; a single one may stand alone."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or any(not isinstance(pattern, str) for pattern in found):
        raise ValueError(f"{name}={value!r} is not a list of patterns. Give names as of files, such as '*.mlp.*'.")
    return list(found)
