"""PrecisionFallback(monitor="saturation"): what saturates is what NumericsMonitor says, of every format."""

from typing import Any

import pytest
import torch
from contract.fallback_checks import Converting
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_stable.callbacks.numerics_monitor import NumericsMonitor
from lightning_stable.callbacks.precision_fallback import PrecisionFallback
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.testing.harness import fit


class Keeps(Callback):
    """Keeps the saturation that the fallback measured of each step."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        (plugin,) = (each for each in trainer.callbacks if isinstance(each, PrecisionFallback))
        ((share,), _) = plugin.state_dict()["signals"]["pending"]
        self.shares.append(share)


class Wide(LightningModule):
    """A linear layer whose input has four dimensions, and rows that blocks of 32 do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layer = torch.nn.Linear(40, 8)
        self.x = 3 * torch.randn(4, 3, 5, 40)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(self.x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4", "shift3", "ternary"])
def test_saturation_is_what_the_monitor_reports(form: str) -> None:
    class Blocks(Converting):
        quantizers = dict.fromkeys(("weights", "activations", "gradients"), Quantizer(form))

    probe, monitor = Keeps(), NumericsMonitor(every_n_steps=1, picture=None)
    plugin = Blocks("saturation", limits={"saturation": 1.0})
    fit([plugin, monitor, probe], module=Wide(), max_steps=2, limit_val_batches=0)
    reported = monitor.record()["values"][:, :, 1].amax(1).tolist()
    assert probe.shares == pytest.approx(reported, rel=1e-5)
    assert min(reported) > 0.01


@pytest.mark.parametrize(
    "settings", [{"format": "e2m1", "scaling": "channel"}, {"format": "int8", "scaling": "tensor"}]
)
def test_saturation_where_nothing_can_saturate_is_refused(settings: dict[str, Any]) -> None:
    class Fitted(Converting):
        quantizers = {"weights": Quantizer(**settings)}  # noqa: RUF012

    message = r"PrecisionFallback\(monitor=\['saturation'\]\): saturation would always be 0, since every operand"
    with pytest.raises(ValueError, match=message):
        fit([Fitted("saturation")], module=Wide(), max_steps=1, limit_val_batches=0)
