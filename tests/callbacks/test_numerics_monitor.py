"""NumericsMonitor: what it reports of converted and of other layers, when, where to, and that it changes nothing."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.numerics_checks import Operands
from gradients import entries
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from oracles.numerics_twin import Counts, quantized
from torch import Tensor

from lightning_stable.callbacks._numerics_taps import NumericsTaps
from lightning_stable.callbacks.lae import LAE
from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.numerics_monitor import NumericsMonitor
from lightning_stable.callbacks.sam import SAM
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import convert, quantized_layers
from lightning_stable.testing.harness import MODULES, DictNet, Net, SaveAt, Stream, assert_same, fit
from lightning_stable.testing.modules import TwoOptimizerNet
from lightning_stable.testing.workers import Pair

OPERANDS = ("weights", "activations", "gradients")
ROWS = [[layer, operand] for layer in ("body.0", "head") for operand in OPERANDS]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(path: str = "numbers") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path, "numerics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- what is reported


def test_a_window_adds_up_its_steps_and_nothing_else() -> None:
    windows: list[list[tuple[str, str, Tensor]]] = [[], []]

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # Steps 3 to 5 of each six, of three micro-batches.
            number, step = divmod(trainer.global_step, 6)
            seen.found = windows[number] if step >= 3 else []

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.found = []

    module = Net()
    seen = Operands(module)
    monitor = NumericsMonitor(every_n_steps=6, window=3, format="e4m3")
    # With validations between the micro-batches of a step.
    settings = {"accumulate_grad_batches": 3, "val_check_interval": 2, "num_sanity_val_steps": 2}
    fit([monitor, Seen()], module=module, validation=Stream(2, seed=5), max_steps=12, **settings)
    record = monitor.record()
    assert record["rows"] == ROWS
    assert record["steps"] == [6, 12]
    for report, window in enumerate(windows):
        for place, (layer, operand) in enumerate(ROWS):
            counts = Counts(448.0)
            own = [value for name, kind, value in window if (name, kind) == (layer, operand)]
            assert len(own) == 9
            for value in own:
                counts.add(value, quantized(value, "e4m3"))
            assert record["values"][report, place].tolist() == pytest.approx(counts.measures(), rel=1e-4)


def test_formats_may_differ_and_layers_be_chosen() -> None:
    settings = {"format": "e4m3", "gradient_format": "e5m2", "scaling": "tensor", "exclude": ["body*"]}
    monitor = NumericsMonitor(every_n_steps=2, operands=["gradients", "weights"], directory="numbers", **settings)
    fit([monitor], max_steps=2, limit_val_batches=0)
    (line,) = lines()
    formats = {operand: entry["format"] for operand, entry in line["layers"]["head"].items()}
    assert formats == {"weights": "e4m3 tensor", "gradients": "e5m2 tensor"}
    assert sorted(line["layers"]) == ["head"]


# ---------------------------------------------------------------------------------------------------- converted layers


class Converts(Callback):
    """Converts the head before training, as a precision plugin does, and gives it back afterwards."""

    def __init__(self, **quantizers: Quantizer) -> None:
        self.quantizers = quantizers

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        convert(pl_module, include=["head"], **self.quantizers)


def test_converted_layers_show_their_own_quantizers() -> None:
    quantizers = {"weights": Quantizer("int4", scaling="row"), "gradients": Quantizer("e5m2")}
    monitor = NumericsMonitor(every_n_steps=1, directory="numbers")
    run = fit([Converts(**quantizers), monitor], max_steps=3, limit_val_batches=0)
    assert monitor.record()["rows"] == [["head", "weights"], ["head", "gradients"]], "activations stay exact"
    weight = run.steps[0].before["head.weight"]
    scale = weight.abs().amax(1, keepdim=True) / 7
    counts = Counts(math.inf)
    counts.add(weight, (weight / scale).round() * scale)
    assert monitor.record()["values"][0, 0].tolist() == pytest.approx(counts.measures(), rel=1e-4)
    assert monitor.record()["values"][:, 1].isfinite().all()
    assert lines()[0]["layers"]["head"]["weights"]["format"] == "int4 row"
    assert not quantized_layers(run.module)["head"].observers


def test_other_layers_show_what_a_format_would_do_beside_them() -> None:
    monitor = NumericsMonitor(every_n_steps=1, format="e4m3", directory="numbers")
    fit([Converts(weights=Quantizer("int2", scaling="tensor")), monitor], max_steps=1, limit_val_batches=0)
    (line,) = lines()
    assert line["layers"]["head"]["weights"]["format"] == "int2 tensor"
    assert line["layers"]["body.0"]["weights"]["format"] == "e4m3"
    assert line["layers"]["head"]["weights"]["sqnr"] < line["layers"]["body.0"]["weights"]["sqnr"] - 10


def test_a_layer_that_computes_in_high_precision_has_nothing_to_say() -> None:
    class Pauses(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            quantized_layers(pl_module)["head"].enabled = batch_idx != 1

    monitor = NumericsMonitor(every_n_steps=1)
    fit([Converts(weights=Quantizer("e4m3")), Pauses(), monitor], max_steps=3, limit_val_batches=0)
    assert monitor.record()["steps"] == [1, 3]


@pytest.mark.parametrize("converted", [False, True])
def test_it_changes_no_bit(converted: bool) -> None:
    quantizers = {kind: Quantizer("e4m3", rounding="stochastic") for kind in OPERANDS}

    def run(plugins: list[Any]) -> dict[str, Any]:
        torch.manual_seed(3)
        module = Net(dropout=0.3)
        done = fit([*([Converts(**quantizers)] if converted else []), *plugins], module=module, max_steps=8)
        steps = [step._asdict() for step in done.steps]
        return {"weights": done.module.state_dict(), "steps": steps, "random": torch.rand(3)}

    monitor = NumericsMonitor(every_n_steps=2, window=2, format="e5m2")
    assert_same(run([monitor]), run([]), "with the monitor against without")
    assert monitor.record()["values"].shape == (4, 6, 4)


def test_formats_that_are_all_none_are_warned_about_and_nothing_is_watched() -> None:
    monitor = NumericsMonitor(every_n_steps=1, directory="numbers")
    with pytest.warns(UserWarning, match="NumericsMonitor watches nothing in this run") as told:
        run = fit([Converts(), monitor], max_steps=2, limit_val_batches=0)
    assert len([warning for warning in told if "watches nothing" in str(warning.message)]) == 1
    assert (monitor.latest, monitor.record()["steps"], monitor.state_dict()) == ({}, [], {})
    assert not any(name.startswith("numerics") for _, entry in run.logged for name in entry)
    assert not list(Path().iterdir())
    # With a format to try they are layers like all others.
    results = []
    for callbacks in ([Converts()], []):
        monitor = NumericsMonitor(every_n_steps=1, format="e4m3")
        fit([*callbacks, monitor], max_steps=2, limit_val_batches=0)
        results.append(monitor.record())
    assert_same(*results, "converted to nothing against not converted")


def test_without_converted_layers_it_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"finds no converted layer in Net.*SimulatedPrecision.*format='e4m3'"):
        fit([NumericsMonitor()], max_steps=2)


# ---------------------------------------------------------------------------------------------------- when and where to


def test_reports_come_at_their_steps_under_the_hosts_numbers() -> None:
    monitor = NumericsMonitor(every_n_steps=3, format="e4m3")
    run = fit([monitor], max_steps=10, limit_val_batches=0, accumulate_grad_batches=2)
    assert list(entries(run.logged, "numerics/weights/sqnr_worst")) == [2, 5, 8]
    assert monitor.record()["steps"] == [3, 6, 9]
    names = {name for _, entry in run.logged for name in entry if name.startswith("numerics")}
    assert len(names) <= 21
    assert not any("head" in name for name in names)
    assert monitor.latest == {name: pytest.approx(entries(run.logged, name)[8]) for name in monitor.latest}


def test_two_optimizers_count_as_one_step() -> None:
    monitor = NumericsMonitor(every_n_steps=2, format="e4m3")
    run = fit([monitor], module=TwoOptimizerNet(), max_steps=12, limit_val_batches=0)
    assert monitor.record()["steps"] == [2, 4, 6]
    assert list(entries(run.logged, "numerics/gradients/absmax_worst")) == [1, 3, 5]


def test_passes_of_other_callbacks_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(NumericsTaps, "_add", lambda self, layer, operand, *rest: shown.append((layer, operand)))
    for other in (SAM(rho=0.5), MESA(start_epoch=0), LAE(["body*"], decay=0.5, task_steps=[1])):
        for order in (1, -1):
            shown.clear()
            beside = NumericsMonitor(every_n_steps=1, format="e4m3")
            fit([beside, other][::order], validation=Stream(2, seed=5), max_steps=3, num_sanity_val_steps=2)
            assert sorted(shown) == sorted(3 * [tuple(row) for row in ROWS]), type(other).__name__


def test_a_second_pass_through_converted_layers_is_not_watched() -> None:
    quantizers = {"weights": Quantizer("e4m3"), "gradients": Quantizer("e4m3")}
    records = []
    for others in ([], [SAM(rho=0.5)]):
        monitor = NumericsMonitor(every_n_steps=1)
        fit([Converts(**quantizers), monitor, *others], max_steps=1)
        records.append(monitor.record())
    assert_same(*records, "converted layers beside SAM")


def test_files_go_to_the_loggers_folder() -> None:
    run = fit(
        [NumericsMonitor(every_n_steps=2, format="e4m3")], max_steps=4, limit_val_batches=0, logger=CSVLogger(".")
    )
    folder = Path(run.trainer.log_dir)
    assert [line["step"] for line in lines(str(folder))] == [2, 4]
    assert (folder / "numerics.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_folder_nothing_is_written_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit([NumericsMonitor(every_n_steps=2, format="e4m3")], max_steps=2, limit_val_batches=0)
    assert "NumericsMonitor writes no numerics.jsonl" in caplog.text
    assert not list(Path().iterdir())


def test_a_full_disk_is_no_end_to_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    monitor = NumericsMonitor(every_n_steps=1, format="e4m3", directory="numbers", picture=None)
    with pytest.warns(RuntimeWarning, match=r"its files could not be written \(OSError: no space left\)") as told:
        fit([monitor], max_steps=3, limit_val_batches=0)
    assert len([warning for warning in told if "files could not be" in str(warning.message)]) == 1
    assert monitor.record()["steps"] == [1, 2, 3]


def test_without_matplotlib_that_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit([NumericsMonitor(every_n_steps=2, format="e4m3", directory="numbers")], max_steps=2, limit_val_batches=0)
    assert "drew no picture: The picture needs matplotlib, which is missing" in caplog.text
    assert len(lines()) == 1


# ---------------------------------------------------------------------------------------------------- going on


def resumable(directory: str) -> NumericsMonitor:
    return NumericsMonitor(every_n_steps=4, window=3, format="e4m3", directory=directory)


def test_a_resumed_run_goes_on_with_records_file_and_window() -> None:
    straight = resumable("straight")
    fit([straight], max_steps=12, limit_val_batches=0)
    fit([resumable("cut"), SaveAt(7, "cut.ckpt")], max_steps=9, limit_val_batches=0)
    assert [line["step"] for line in lines("cut")] == [4, 8]
    on = resumable("cut")
    fit([on], max_steps=12, limit_val_batches=0, ckpt_path="cut.ckpt")
    # The checkpoint lies in the middle of a window.
    assert_same(on.record(), straight.record(), "resumed against uninterrupted")
    assert lines("cut") == lines("straight")
    # In another folder what came before is known by its measures alone.
    fit([resumable("new")], max_steps=12, limit_val_batches=0, ckpt_path="cut.ckpt")
    first, *rest = lines("new")
    assert rest == lines("straight")[1:]
    entry, known = first["layers"]["head"]["weights"], lines("straight")[0]["layers"]["head"]["weights"]
    assert entry == {name: pytest.approx(known[name]) for name in ("underflow", "saturation", "sqnr", "absmax")}


def test_another_fit_begins_anew_and_a_longer_one_goes_on() -> None:
    monitor, module = NumericsMonitor(every_n_steps=2, format="e4m3", directory="numbers"), Net()
    run = fit([monitor], module=module, max_steps=4, limit_val_batches=0)
    run.trainer.fit_loop.epoch_loop.max_steps = 8
    fit([monitor], module=module, trainer=run.trainer)
    assert monitor.record()["steps"] == [line["step"] for line in lines()] == [2, 4, 6, 8]
    fit([monitor], module=module, max_steps=2, limit_val_batches=0)
    assert monitor.record()["steps"] == [line["step"] for line in lines()] == [2]


@pytest.mark.parametrize("converted", [False, True])
def test_nothing_is_left_after_a_failure(converted: bool) -> None:
    module = DictNet()
    module.fail_at = ("backward", 3)
    monitor = NumericsMonitor(every_n_steps=1, format="e4m3")
    with pytest.raises(RuntimeError, match="deliberate failure"):
        fit([*([Converts(weights=Quantizer("e4m3"))] if converted else []), monitor], module=module, max_steps=6)
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())
    assert not any(state.observers for state in quantized_layers(module).values())


# ---------------------------------------------------------------------------------------------------- two processes


def two_process_job() -> dict[str, Any]:
    monitor = NumericsMonitor(every_n_steps=2, format="e4m3", picture=None)
    fit([monitor], module=Net(norm=False), max_steps=4, limit_val_batches=0, devices=2, strategy="ddp")
    return monitor.record()


def test_two_processes_sum_up_what_both_have_seen(workers: Pair) -> None:
    first, second = workers.run("callbacks.test_numerics_monitor:two_process_job")
    assert_same(second, first, "rank 1 against rank 0")
    single = NumericsMonitor(every_n_steps=2, format="e4m3")
    fit([single], module=Net(norm=False), max_steps=4, limit_val_batches=0)
    alone = single.record()
    for operand, kind in ((0, "weights"), (1, "activations")):
        places = slice(operand, None, 3)
        assert_same(first["values"][:, places], alone["values"][:, places], kind, tolerance=1e-4)
    # Each process has the gradient of the mean over its half: twice that of the whole.
    assert_same(first["values"][:, 2::3, 3], 2 * alone["values"][:, 2::3, 3], "gradients", tolerance=1e-3)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, r"every_n_steps=0 is not a whole number of optimizer steps from 1 on"),
        ({"every_n_steps": 2, "window": 3}, r"window=3 is more than every_n_steps=2"),
        ({"format": "e9m9"}, r"NumericsMonitor: .*format='e9m9' is unknown"),
        ({"format": "mxfp8", "scaling": "row"}, r"NumericsMonitor: .*scaling='row'"),
        ({"scaling": "tensor"}, r"scaling='tensor' of NumericsMonitor go with format"),
        ({"operands": "weights"}, r"operands='weights' is not a list of names"),
        ({"operands": ["outputs"]}, r"operands='outputs' is unknown. Choose one of 'weights'"),
        ({"include": [3]}, r"include=\[3\] is not a list of names"),
        ({"picture": "mean"}, r"picture='mean' is unknown. Choose one of 'underflow'"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NumericsMonitor(**settings)


def test_a_folder_that_is_a_file_is_told() -> None:
    Path("taken").touch()
    with pytest.raises(ValueError, match="directory='taken' of NumericsMonitor is a file"):
        NumericsMonitor(directory="taken")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"NumericsMonitor finds no converted layer in Net\. .*format='e4m3'\. There are 'body.0', 'head'\."),
        ({"format": "e4m3", "include": ["tail*"]}, r"no layer to watch in Net that matches include=\['tail\*'\]"),
    ],
)
def test_nothing_to_watch_is_told_at_the_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit([NumericsMonitor(**settings)], max_steps=1)


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module_reports(kind: str) -> None:
    case, monitor = MODULES[kind](), NumericsMonitor(every_n_steps=2, format="e4m3")
    fit(
        [monitor],
        module=case.module,
        train=case.train,
        own_loaders=case.train is None,
        max_steps=4,
        limit_val_batches=0,
    )
    assert monitor.record()["steps"] == ([2] if kind == "two optimizers" else [2, 4])
