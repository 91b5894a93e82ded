"""StabilityReport: what it records beside the contracts, its files, resuming them, and what it leaves alone."""

import csv
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gradients import entries
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_stable._report.page import Written
from lightning_stable._report.read_json import FILE_NAME
from lightning_stable.callbacks import EMA, SAM, PrecisionFallback, SpikeGuard, StableSPAM, WarmupStableDecay
from lightning_stable.callbacks.stability_report import StabilityReport
from lightning_stable.testing.harness import Net, SaveAt, Stream, fit
from lightning_stable.testing.modules import ManualNet, TwoOptimizerNet
from lightning_stable.testing.workers import Pair


def report(**settings: Any) -> StabilityReport:
    return StabilityReport(**{"every_n_steps": 4, "directory": "report", "html": False, **settings})


def read(folder: str = "report") -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(folder, FILE_NAME).read_text())
    return record


def test_the_norm_and_the_loss_are_those_before_others_act() -> None:
    alone, among = report(), report()
    fit([alone], max_steps=6)
    fit([StableSPAM(), SpikeGuard(), among], max_steps=6)
    first, last = (each.record()["series"] for each in (alone, among))
    assert last["gradient_norm"][0] == first["gradient_norm"][0]
    assert last["loss"][0] == first["loss"][0]
    assert last["gradient_norm"][-1] != first["gradient_norm"][-1]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_second_pass_of_sam_is_no_loss_of_the_step(accumulate: int) -> None:
    # Six batches an epoch: the second update of each has two of its four.
    plain, sharp = report(), report()
    fit([plain], max_steps=1, accumulate_grad_batches=accumulate)
    fit([sharp, SAM(rho=0.5)], max_steps=1, accumulate_grad_batches=accumulate)
    assert sharp.record()["series"]["loss"] == plain.record()["series"]["loss"]
    assert sharp.record()["series"]["gradient_norm"] != plain.record()["series"]["gradient_norm"]


def test_an_update_of_fewer_batches_has_their_mean_loss() -> None:
    plugin = report()
    run = fit([plugin], max_steps=2, accumulate_grad_batches=4)
    module, stream = Net(), Stream()
    module.load_state_dict({**run.steps[1].before, **dict(module.named_buffers())})
    losses = [float(module.loss(stream.batch(number)).detach()) for number in (4, 5)]
    assert plugin.record()["series"]["loss"][1] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_each_of_several_optimizers_has_its_own_steps() -> None:
    plugin = report(every_n_steps=2)
    run = fit([plugin], module=TwoOptimizerNet(), max_steps=12)
    series = plugin.record()["series"]
    assert series["step"] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert series["optimizer"] == [0, 1] * 6
    assert all(math.isfinite(value) for name in ("loss", "gradient_norm") for value in series[name])
    assert set(entries(run.logged, "stability_report/loss/1")) == {1, 3, 5}


def test_manual_optimisation_has_the_loss_of_its_backward_passes() -> None:
    plugin = report()
    fit([plugin], module=ManualNet(), max_steps=5)
    assert len([value for value in plugin.record()["series"]["loss"] if value > 0]) == 5


# The host says so once in a process.
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_that_is_skipped_is_not_known_and_not_counted() -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    plugin = report()
    fit([plugin], module=Skips(), max_steps=5)
    record = plugin.record()
    assert record["series"]["loss_known"] == [True, True, False, True, True]
    assert record["series"]["loss"][2] is None
    assert (record["not_finite"]["loss"], record["unknown"]["loss"]) == ([0, None], 1)


class Unequal(ManualNet):
    """Two optimizers, of which the second makes one step for five of the first."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = cast(list[Any], self.optimizers())
        loss = self.loss(batch)
        first.zero_grad()
        second.zero_grad()
        loss.backward()  # past the host
        first.step()
        if self.seen % 5 == 4:
            second.step()
        self.seen += 1

    seen = 0

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.SGD(part, lr=0.01) for part in (parameters[:1], parameters[1:])]


def test_optimizers_that_step_unequally_keep_their_record_in_a_second_fit() -> None:
    plugin, module = report(every_n_steps=5), Unequal()
    run = fit([plugin], module=module, max_steps=12)
    series = plugin.record()["series"]
    assert [series["optimizer"].count(place) for place in (0, 1)] == [10, 2]
    assert plugin.record()["unknown"] == {"loss": 12, "gradient_norm": 0}
    assert plugin.record()["not_finite"]["loss"] == [0, None]
    assert set(entries(run.logged, "stability_report/gradient_norm/0")) == {4, 9}
    run.trainer.fit_loop.epoch_loop.max_steps = 24
    run.trainer.fit(module, Stream())
    series = plugin.record()["series"]
    assert [series["optimizer"].count(place) for place in (0, 1)] == [20, 4]


def test_under_a_gradient_scaler_loss_and_norm_are_unscaled() -> None:
    found = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]):
        plugin = report()
        fit([plugin, *plugins], max_steps=3)
        found.append(plugin.record()["series"])
    for name in ("loss", "gradient_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.05)


def test_a_rate_on_the_device_is_read_with_the_rest() -> None:
    class TensorRates(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.25), capturable=False, foreach=False)

    plugin = report()
    fit([plugin], module=TensorRates(), max_steps=3)
    assert plugin.record()["series"]["lr"] == [[0.25]] * 3


def test_sparse_gradients_have_a_norm() -> None:
    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(5, 2, sparse=True)

        def loss(self, batch: Any) -> Any:
            return super().loss(batch) + self.table(torch.tensor([1, 1, 3])).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    plain, sparse = report(), report()
    fit([plain], max_steps=1)
    fit([sparse], module=Sparse(), max_steps=1)
    squares = [plugin.record()["series"]["gradient_norm"][0] ** 2 for plugin in (plain, sparse)]
    # Two rows of two ones, one of them twice.
    assert squares[1] - squares[0] == pytest.approx(2 * (2**2 + 1), rel=1e-3)


def test_phases_switches_and_validations_of_others_are_recorded() -> None:
    plugin = report()
    fit(
        [WarmupStableDecay(warmup=3, decay=4), plugin],
        validation=Stream(2, seed=5),
        max_steps=12,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    record = read()
    assert record["phases"] == [[1, "warmup"], [4, "stable"], [9, "decay"]]
    assert [step for step, _ in record["metrics"]["val_loss"]] == [3, 6, 9, 12]
    assert record["model"]["class"] == "Net"
    assert record["environment"]["torch"] == torch.__version__
    assert (record["steps"], record["epochs"]) == (12, 2)
    fallback = PrecisionFallback(monitor=["loss"])
    fallback._events = [{"step": 3, "precision": "high", "reason": "loss"}]
    from lightning_stable.callbacks._report_facts import events_of

    assert events_of(Trainer(callbacks=[fallback], logger=False, accelerator="cpu", enable_checkpointing=False)) == [
        {"step": 3, "what": "PrecisionFallback: high precision (loss)"}
    ]


def test_a_fit_leaves_the_file_and_a_page_that_has_the_log() -> None:
    logger = CSVLogger("logs", "name", "v0", flush_logs_every_n_steps=1000)
    fit(
        [StabilityReport(every_n_steps=2, pictures=True)],
        validation=Stream(2, seed=5),
        max_steps=6,
        logger=logger,
        val_check_interval=3,
    )
    folder = Path("logs/name/v0")
    assert read(str(folder))["steps"] == 6
    text = (folder / "report.html").read_text()
    assert "val_loss" in text
    assert text.count("<svg") > 3
    assert (folder / "report_pictures" / "loss.png").is_file()
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["stability_report/gradient_norm"]]
    assert [row["step"] for row in logged] == ["1", "3", "5"]


def test_a_resumed_run_goes_on_and_drops_what_came_after_the_checkpoint() -> None:
    def run(steps: int, **more: Any) -> tuple[dict[str, Any], Any]:
        plugin = report(directory="second" if more else "first")
        saver = SaveAt(5, "five.ckpt")
        validations = {"val_check_interval": 2, "check_val_every_n_epoch": None}
        done = fit([saver, plugin], validation=Stream(2, seed=5), max_steps=steps, **validations, **more)
        return read(plugin.directory), done

    first, _ = run(9)
    state = torch.load("five.ckpt", weights_only=True)["callbacks"]["StabilityReport"]
    assert len(state["rows"]) == len(state["own"]["seconds"]) == 5
    second, _ = run(12, ckpt_path="five.ckpt")
    assert second["series"]["step"] == list(range(1, 13))
    for name in ("loss", "gradient_norm", "lr"):
        assert second["series"][name][:9] == first["series"][name]
    assert second["series"]["seconds"][:5] == first["series"]["seconds"][:5]
    assert second["series"]["seconds"] == sorted(second["series"]["seconds"])
    assert [step for step, _ in second["metrics"]["val_loss"]] == [2, 4, 6, 8, 10, 12]


def test_a_second_fit_begins_anew_and_a_continued_one_goes_on() -> None:
    plugin, module = report(), Net()
    first = fit([plugin], module=module, max_steps=5)
    first.trainer.fit_loop.epoch_loop.max_steps = 8
    first.trainer.fit(module, Stream())
    assert read()["series"]["step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    fit([plugin], module=module, max_steps=3)
    assert read()["series"]["step"] == [1, 2, 3]
    fit([plugin], max_steps=2)
    assert read()["steps"] == 2


def test_a_failure_leaves_what_was_done() -> None:
    module = Net()
    module.fail_at = ("train", 6)
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([report(every_n_steps=100)], module=module, max_steps=9)
    assert read()["series"]["step"] == [1, 2, 3, 4, 5, 6]
    assert not Path("report/report.html").exists()


def test_a_failure_says_how_the_page_is_made(caplog: pytest.LogCaptureFixture) -> None:
    module = Net()
    module.fail_at = ("train", 2)
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="deliberate"):
        fit([report(html=True)], module=module, max_steps=4)
    assert "lightning-stable report report" in caplog.text


def test_the_file_is_written_every_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_stable.callbacks._report_files._SECONDS", 0.0)
    seen = []

    class Looks(StabilityReport):
        def on_train_batch_start(self, *args: Any) -> None:
            super().on_train_batch_start(*args)
            seen.append(read()["steps"] if Path("report", FILE_NAME).is_file() else 0)

    fit([Looks(every_n_steps=2, directory="report", html=False)], max_steps=6)
    assert seen == [0, 0, 2, 2, 4, 4]


def test_what_cannot_be_written_is_a_warning_and_no_end() -> None:
    plugin = report(html=True)
    Path("report").touch()
    with (
        pytest.warns(RuntimeWarning, match="StabilityReport: its file could not be written"),
        pytest.warns(RuntimeWarning, match="StabilityReport: its page could not be written"),
    ):
        assert len(fit([plugin], max_steps=5).steps) == 5


class Wide(SingleDeviceStrategy):
    """Has what strategies with local steps have, and keeps it as it likes."""

    local_steps, comm_dtype, workers = 2, torch.bfloat16, torch.device("cpu")


def test_settings_of_a_strategy_are_written_as_plain_values() -> None:
    fit([report()], max_steps=2, strategy=Wide())
    kept = {"name": "Wide", "local_steps": 2, "workers": "cpu", "comm_dtype": "bfloat16"}
    assert read()["strategy"] == kept


@pytest.mark.parametrize(
    ("others", "weights"),
    [
        ([], "live"),
        ([EMA(0.9)], "average"),
        ([EMA(0.9, validate_with="live")], "live"),
        ([WeightAveraging()], "average"),
    ],
)
def test_the_record_says_which_weights_were_validated(others, weights):
    fit([report(), *others], max_steps=2)
    assert read()["validated_weights"] == weights


def test_a_record_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_stable.callbacks.stability_report.strategy_of", lambda trainer: {"name": torch.bfloat16}
    )
    with pytest.warns(RuntimeWarning, match=r"could not be written \(TypeError: .* The run goes on"):
        assert len(fit([report()], max_steps=3).steps) == 3


def test_without_matplotlib_a_warning_says_what_the_page_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_stable._report.page.write_page", lambda runs, path: Written(path, "It needs a."))
    with pytest.warns(UserWarning, match=r"a page without pictures. It needs a\."):
        fit([report(html=True)], max_steps=2)


@pytest.mark.parametrize("settings", [{"logger": False}, {"fast_dev_run": 2}], ids=str)
def test_without_a_folder_nothing_is_written(settings: dict[str, Any], tmp_path: Path) -> None:
    fit([StabilityReport(every_n_steps=1)], **{"max_steps": 2, **settings})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"spike_threshold": -1.0}, "spike_threshold=-1.0"),
        ({"spike_window": 1}, "spike_window=1"),
        ({"directory": __file__}, "is a file"),
        ({"pictures": True, "html": False}, "pictures=True"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityReport(**settings)


def two_process_job(strategy: str) -> dict[str, Any]:
    import os
    import tempfile

    os.chdir(tempfile.mkdtemp())
    plugin = report(every_n_steps=3)
    own = fit([plugin], module=Net(norm=False), max_steps=8, devices=2, strategy=strategy)
    return {**plugin.record(), "written": Path("report", FILE_NAME).is_file(), "rank": own.trainer.global_rank}


def test_two_processes_record_the_mean_and_one_writes(workers: Pair) -> None:
    first, second = workers.run("callbacks.test_stability_report:two_process_job", strategy="ddp")
    plugin = report()
    fit([plugin], module=Net(norm=False), max_steps=8)
    alone = plugin.record()["series"]
    for name in ("loss", "gradient_norm"):
        assert first["series"][name] == second["series"][name] == pytest.approx(alone[name], rel=1e-4)
    assert (first["written"], second["written"]) == (True, False)


def test_workers_that_train_apart_record_their_rounds(workers: Pair) -> None:
    import lightning_stable.strategies  # noqa: F401  for its name

    first, second = workers.run("callbacks.test_stability_report:two_process_job", strategy="local_sgd")
    assert first["series"]["loss"] == second["series"]["loss"]
    assert first["strategy"]["name"] == "LocalSGDStrategy"
    assert first["finished_rounds"] == len(first["rounds"])
