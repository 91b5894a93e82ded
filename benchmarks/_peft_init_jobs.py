"""What `peft_init_cost` runs: adapters of one kind put into a stack of large layers, by this package and by peft."""

import gc
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_stable.functional.pissa import pissa_factors
from lightning_stable.peft.adapters import Adapters

__all__ = [
    "CASES",
    "RANK",
    "ROWS",
    "Case",
    "Stack",
    "Trial",
    "by_peft",
    "ours",
    "passing",
    "peak",
    "quiet",
    "seconds",
    "weights",
]

RANK = 16
# Rows of a batch: few for gradients, so that what a pass keeps for the way back is small beside one of them.
ROWS = {"eva": 512, "lora_ga": 32}
# Batches that EVA may take until its components are settled, each of them new.
MOST = 64
_ONCE = 1000

Measure = Callable[[Callable[[], object]], None]
_TARGETS = r"layers\.\d+"


class Case(NamedTuple):
    """A way to start adapters.

    Attributes:
        name: As the tables have it.
        init: The setting of ``Adapters``.
        peer: peft's ``init_lora_weights``; ``None`` if it has none.
        options: Settings of the initialiser.
        batches: Batches to start from.
        alone: Without putting adapters in: the factors of adapters that are there.
        every: Measured in every so many rounds.
    """

    name: str
    init: str
    peer: str | bool | None
    options: Mapping[str, Any] = MappingProxyType({})
    batches: int = 1
    alone: bool = False
    every: int = 1


def _eva(batches: int) -> Case:
    # No cosine is above 1: every batch is used.
    return Case(f"EVA, {batches} batches", "eva", "eva", {"tau": 1.0}, batches, every=2)


CASES = {
    case.name: case
    for case in (
        Case("LoRA", "default", True),
        Case("PiSSA", "pissa", "pissa_niter_4"),
        Case("PiSSA, factors alone", "pissa", "pissa_niter_4", alone=True),
        Case("PiSSA, full SVD", "pissa", "pissa", {"iterations": None}, every=_ONCE),
        *map(_eva, (4, 8, 16)),
        Case("EVA, until settled", "eva", "eva", batches=MOST, every=_ONCE),
        Case("LoRA-GA", "lora_ga", "lora_ga", batches=4, every=2),
        Case("OLoRA", "olora", "olora", every=2),
        Case("LoLDU", "loldu", None),
        Case("SVFit", "svfit", None),
    )
}


class Trial(NamedTuple):
    """What putting adapters into a stack took.

    Attributes:
        seconds: Processor time.
        residual: Frobenius norm of all base weights afterwards.
        passes: Batches that ran through the layers.
    """

    seconds: float
    residual: float
    passes: int


class Residual(nn.Module):
    """Square linear layers, each adding to what it is given, normalised."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.passes = 0
        self.layers = nn.ModuleList()
        for weight in parameters:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.clone())
            self.layers.append(layer)

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, x.shape[-1:]))
        return x


class Stack(LightningModule):
    """The layers, with a loss that has gradients of full rank."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.model = Residual(parameters)
        self.width = parameters[0].shape[1]

    @override
    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        return nn.functional.softplus(self.model(batch)).mean()

    @override
    def configure_optimizers(self) -> None:
        return None


class Batches(Dataset[Tensor]):
    """Rows drawn anew whenever they are asked for, so that none is in memory before."""

    def __init__(self, count: int, rows: int, width: int) -> None:
        self.count, self.rows = count, rows
        self.spread = torch.arange(1, width + 1).rsqrt()

    def __len__(self) -> int:
        return self.count

    @override
    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(self.rows, len(self.spread), generator=generator) * self.spread


class Timed(Adapters):
    """Adapters that take the time that putting them in takes, without that of the rest of a fit."""

    def __init__(self, measure: Measure, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._measure = measure

    @override
    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(lambda: super(Timed, self)._begin(trainer, pl_module))


def weights(count: int, width: int) -> list[Tensor]:
    """Return square matrices whose singular values fall, as those of trained weights do."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, width + 1).rsqrt()
    found = []
    for _ in range(count):
        left, right = (torch.randn(width, width, generator=generator) for _ in range(2))
        found.append((left * spread) @ right / width)
    return found


def quiet() -> None:
    """Keep libraries from speaking of GPUs and of what is as it should be here, and from being collected."""
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import peft  # noqa: F401  before the collector is told what stays

    gc.freeze()


def ours(case: Case, module: Stack, rows: int, measure: Measure) -> None:
    """Adapt a stack by a fit of zero steps; ``measure`` is called with what to measure."""
    if case.alone:
        layers = _with_adapters(module)
        measure(lambda: [_start_pissa(layer) for layer in layers])
        return
    config: dict[str, Any] = {"r": RANK, "target_modules": _TARGETS}
    if case.init not in ("loldu", "svfit"):
        config["lora_alpha"] = RANK
    adapters = Timed(measure, config, init=case.init, init_batches=case.batches, init_options=dict(case.options))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=0,
        callbacks=[adapters],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _loader(case.batches, rows, module.width))


def by_peft(case: Case, module: Stack, rows: int, measure: Measure) -> None:
    """Adapt a stack by peft, as its guides do it; arguments as of :func:`ours`."""
    from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model

    if case.alone:
        layers = _with_adapters(module)
        measure(lambda: [layer.pissa_init("default", case.peer) for layer in layers])
        return
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_TARGETS, init_lora_weights=case.peer)  # type: ignore[arg-type] # any text
    loader = _loader(case.batches, rows, module.width)
    if case.peer == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        measure(lambda: _peft_lora_ga(module, config, loader))
    elif case.peer == "eva":
        config.eva_config = EvaConfig(tau=case.options.get("tau", 0.99))
        measure(lambda: _peft_eva(module, config, loader, case.batches))
    else:
        measure(lambda: get_peft_model(module.model, config))  # type: ignore[arg-type] # any module


def seconds(adapt: Any, case: Case, module: Stack, rows: int) -> Trial:
    """Measure how long adapting a stack takes; ``adapt`` is :func:`ours` or :func:`by_peft`."""
    found = []

    def measure(action: Callable[[], object]) -> None:
        gc.collect()
        began = time.process_time()
        action()
        found.append(time.process_time() - began)

    adapt(case, module, rows, measure)
    bases = [getattr(layer, "base_layer", layer).weight for layer in module.model.layers]
    left = sum(float(base.detach().double().square().sum()) for base in bases) ** 0.5
    return Trial(found[0], left, module.model.passes)


def passing(module: Stack, batches: int, rows: int) -> float:
    """Return the processor time of making batches and passing them through the layers, which EVA cannot do without."""
    began = time.process_time()
    with torch.no_grad():
        for batch in _loader(batches, rows, module.width):
            module.training_step(batch)
    return time.process_time() - began


def peak(job: tuple[str, bool, int, int, int]) -> float:
    """Return the most memory, in bytes, that adapting a stack takes beyond its weights; in a process of its own.

    Args:
        job: Name of the case, whether by this package, layers, width and rows of a batch.
    """
    name, own, count, width, rows = job
    quiet()
    torch.set_num_threads(1)
    case, adapt = CASES[name], ours if own else by_peft
    # Libraries are loaded, and what they keep is made, before the count begins.
    seconds(adapt, case, Stack(weights(2, 64)), min(rows, 48))
    gc.freeze()
    module, found = Stack(weights(count, width)), []

    def measure(action: Callable[[], object]) -> None:
        gc.collect()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        action()
        found.append(_status("VmHWM") - before)

    adapt(case, module, rows, measure)
    return found[0]


class _EnoughError(Exception):
    """All batches were used."""


def _peft_eva(module: Stack, config: Any, loader: Any, batches: int) -> None:
    from peft import get_peft_model, initialize_lora_eva_weights

    def forward(model: nn.Module, batch: Tensor) -> None:
        # One pass more than batches: the first one looks for equal inputs. It has no other limit than being settled.
        if module.model.passes > batches:
            raise _EnoughError
        model(batch)

    adapted = get_peft_model(module.model, config)
    try:
        initialize_lora_eva_weights(
            adapted,
            loader,
            forward_fn=forward,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    except _EnoughError:
        return


def _peft_lora_ga(module: Stack, config: Any, loader: Any) -> None:
    from peft import get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    def train_step() -> None:
        for batch in loader:
            module.training_step(batch).backward()  # type: ignore[no-untyped-call]

    preprocess_loraga(module.model, config, train_step)
    get_peft_model(module.model, config)


def _with_adapters(module: Stack) -> list[Any]:
    """Put plain adapters in, and return the adapted layers."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_TARGETS), module.model)
    return list(module.model.layers)


def _start_pissa(layer: Any) -> None:
    """Do to an adapted layer what peft's ``pissa_init`` does."""
    factors = pissa_factors(layer.base_layer.weight, RANK, layer.scaling["default"])
    layer.lora_A["default"].weight.data = factors.a
    layer.lora_B["default"].weight.data = factors.b
    layer.base_layer.weight.data = factors.residual


def _loader(batches: int, rows: int, width: int) -> DataLoader[Tensor]:
    return DataLoader(Batches(batches, rows, width), batch_size=None)


def _status(name: str) -> float:
    """Return an entry of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))
