"""Reading runs: what loggers and callbacks leave, whole, cut, empty or resumed."""

import json
import math
import sys

import pytest
from report.report_runs import losses, write_csv, write_gap, write_numerics, write_record, write_run

from lightning_stable._report.facts import facts_of, loss_names, training_loss, validation_names
from lightning_stable._report.page import write_page
from lightning_stable._report.read import find_runs, has_files, read_run
from lightning_stable._report.run import append, thin
from lightning_stable._report.settings import adapter_facts, differences, flat_settings
from lightning_stable._report.write import as_json, write_atomically


def test_a_run_of_a_csv_logger(tmp_path):
    run = read_run(write_run(tmp_path / "runs" / "v0"))
    assert run.name == "runs/v0"
    assert run.of("train_loss") == [(step + 1, value) for step, value in enumerate(losses())]
    assert run.of("val_accuracy")[0] == (50, pytest.approx(1 - 1 / 51))
    assert run.sources == ["config.yaml", "metrics.csv"]
    assert run.notes == []
    facts = facts_of(run)
    assert (facts.steps, facts.epochs, facts.seconds, facts.spikes, facts.diverged) == (300, 3, None, 1, "")
    assert facts.loss == pytest.approx(1.0, abs=0.05)
    assert [each.name for each in facts.validated] == ["val_loss", "val_loss_live", "val_accuracy"]


def test_a_last_line_that_is_cut_is_left_out(tmp_path):
    path = write_csv(tmp_path, [{"loss": 1.0, "step": step} for step in range(120)])
    path.write_text(path.read_text() + "0.5,12")  # of 0.5,120
    assert read_run(tmp_path).of("loss")[-1] == (120, 1.0)


def test_a_run_that_went_back_gives_way_to_what_came_after(tmp_path):
    rows = [{"step": step, "loss": 1.0} for step in range(0, 60, 5)] + [{"step": s, "loss": 2.0} for s in (33, 38, 43)]
    run = read_run(write_csv(tmp_path, rows).parent)
    assert run.of("loss") == [(step + 1, 1.0) for step in range(0, 35, 5) if step < 33] + [
        (34, 2.0),
        (39, 2.0),
        (44, 2.0),
    ]


def test_gaps_and_what_is_no_number_stay_as_they_are(tmp_path):
    rows = [{"step": 0, "a": "nan", "b": ""}, {"step": "", "a": 1}, {"step": 9, "a": "inf", "b": "text"}]
    run = read_run(write_csv(tmp_path, rows).parent)
    assert list(run.series) == ["a"]
    assert [step for step, _ in run.of("a")] == [1, 10]
    assert math.isnan(run.of("a")[0][1])
    assert run.of("a")[1][1] == math.inf
    assert facts_of(run).loss is None


@pytest.mark.parametrize("content", ["", "step,loss\n", "\0\0\0", '{"format": 2}', "[]", "{", '{"format": 1}', "- a\n"])
@pytest.mark.parametrize(
    "name",
    ["metrics.csv", "stability_report.json", "stability_gap.json", "numerics.jsonl", "sweep.json", "config.yaml"],
)
def test_a_damaged_file_is_a_note_and_no_end(name, content, tmp_path):
    write_csv(tmp_path, [{"step": 0, "loss": 1}, {"step": 1, "loss": 2}])
    (tmp_path / name).write_text(content)
    run = read_run(tmp_path)
    assert run.notes or (name == "config.yaml" and content in ("", '{"format": 2}', '{"format": 1}'))
    assert name == "metrics.csv" or run.of("loss") == [(1, 1.0), (2, 2.0)]
    assert all(name in note for note in run.notes)


@pytest.mark.parametrize(
    "more",
    [
        {"rule": {"threshold": 6.0, "window": 128, "gained": 0.05, "other": 1}},
        {"rule": [1]},
        {"spikes": {"loss": [1]}},
        {"spikes": []},
        {"events": [{"what": "a"}]},
        {"events": [{"step": "x", "what": "a"}]},
        {"not_finite": {"loss": 3}},
        {"phases": [[1]]},
        {"steps": "many"},
        {"seconds": -1},
        {"model": {"parameters": "x", "trained": 1}},
        {"model": {"adapter_ranks": {"a": "x"}}},
        {"rounds": [math.inf]},
        {"environment": 3},
    ],
    ids=str,
)
def test_a_damaged_field_of_the_record_is_left_out_with_a_note(more, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_stable._report.page.as_svg", lambda chart, prefix, wide: "<svg></svg>")
    write_record(tmp_path, steps=60)
    record = json.loads((tmp_path / "stability_report.json").read_text())
    (tmp_path / "stability_report.json").write_text(json.dumps({**record, **more}))
    run = read_run(tmp_path)
    (name,) = more
    assert run.notes == [f"stability_report.json: what it has under {name} is damaged and left out."]
    write_page([run], tmp_path / "report.html")
    assert run.notes[0] in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sweep.json", {"cells": [{"share": "x"}], "runs": []}),
        ("sweep.json", {"cells": [{"share": 0.5, "ended": [1]}], "runs": []}),
        ("numerics.jsonl", {"step": 1, "layers": {"a": {"weights": {"underflow": "x"}}}}),
        ("numerics.jsonl", {"step": 1, "layers": {"a": 3}}),
        ("stability_gap.json", {"format": 1, "score": "a", "higher_is_better": True, "tasks": [{"task": "x"}]}),
    ],
    ids=str,
)
def test_what_is_no_number_in_the_files_of_instruments_is_a_note(file, content, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    run = read_run(tmp_path)
    assert len(run.notes) == 1
    assert file in run.notes[0]
    assert (run.sweep, run.numerics, run.gap) == ({}, [], {})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)), "billions of"),
        ("a: &a [*a]\n", "holds itself"),
        (
            "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
            "merges",
        ),
        ("a: " + "[" * 2000 + "]" * 2000, "RecursionError"),
    ],
    ids=["aliases", "a circle", "merges", "depth"],
)
def test_a_config_that_stands_for_too_much_is_a_note(text, why, tmp_path):
    write_csv(tmp_path, [{"step": 0, "loss": 1}])
    (tmp_path / "config.yaml").write_text(text)
    run = read_run(tmp_path)
    (note,) = run.notes
    assert note.startswith("config.yaml could not be read")
    assert why in note
    assert run.config == {}


@pytest.mark.parametrize(
    ("name", "mode", "remark"),
    [
        ("val_loss", None, "best 0.41 at step 2"),
        ("val/Loss_epoch", None, "best 0.41 at step 2"),
        ("val_mse/dataloader_idx_1", None, "best 0.41 at step 2"),
        ("val_acc", None, "best 1 at step 1"),
        ("val_wer", None, "lowest 0.41, highest 1"),
        ("val_lossless", None, "lowest 0.41, highest 1"),
        ("val_wer", "min", "best 0.41 at step 2"),
        ("val_bleu", "max", "best 1 at step 1"),
        ("val_acc", "min", "lowest 0.41, highest 1"),  # one of both is wrong
    ],
)
def test_the_best_is_said_where_it_is_known_which_one_that_is(name, mode, remark, tmp_path):
    run = read_run(write_csv(tmp_path, [{"step": step, name: v} for step, v in enumerate((1.0, 0.41, 0.5))]).parent)
    watch = {"class_path": "a.ModelCheckpoint", "init_args": {"monitor": name, "mode": mode}}
    run.config = {"trainer": {"callbacks": [watch, {**watch, "init_args": {"monitor": "other", "mode": "max"}}]}}
    assert facts_of(run).validated == [(name, 0.5, remark)]


def test_what_is_not_known_is_told_from_what_is_not_finite(tmp_path):
    losses = [1.0, None, None, 4.0]
    series = {
        "step": [1, 2, 3, 4],
        "optimizer": [0] * 4,
        "loss": losses,
        "loss_known": [True, True, False, True],
        "gradient_norm": [None] * 4,
        "gradient_norm_known": [False] * 4,
        "seconds": [0.1, 0.2, 0.3, 0.4],
        "lr": [[0.1]] * 4,
    }
    write_record(tmp_path, series=series, not_finite={"loss": [1, 2]}, unknown={"loss": 1, "gradient_norm": 4})
    run = read_run(tmp_path)
    assert [step for step, _ in run.of("stability_report/loss")] == [1, 2, 4]
    assert training_loss(run).not_finite == 1
    assert "stability_report/gradient_norm" not in run.series
    (note,) = run.notes
    assert note.startswith("The loss of 1 steps is not known")


def test_a_callback_that_one_run_lacks_is_one_line_of_the_differences(tmp_path):
    runs = [read_run(write_run(tmp_path / name, steps=9)) for name in ("a", "b")]
    given = {"every_n_steps": 50, "pictures": True}
    runs[1].config["trainer"]["callbacks"].append({"class_path": "a.StabilityReport", "init_args": given})
    assert differences([run.config for run in runs]) == [
        ("trainer.callbacks[StabilityReport]", ["-", "every_n_steps: 50, pictures: yes"])
    ]


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["val_loss", "my_loss", "train_loss_epoch", "train_loss_step"], "train_loss_step"),
        (["loss", "aux_loss"], "loss"),
        (["train/loss", "acc"], "train/loss"),
        (["generator_loss", "discriminator_loss", "test_loss"], "generator_loss"),
        (["acc", "val_loss"], None),
    ],
)
def test_the_training_loss_is_found_by_its_usual_names(names, first, tmp_path):
    run = read_run(write_csv(tmp_path, [{"step": 1, **dict.fromkeys(names, 0.5)}]).parent)
    assert next(iter(loss_names(run)), None) == first
    found = training_loss(run)
    assert (found and found.name) == first
    assert all(name.startswith("val") for name in validation_names(run))


def test_the_record_of_the_callback_comes_before_the_log(tmp_path):
    write_record(write_run(tmp_path))
    run = read_run(tmp_path)
    loss = training_loss(run)
    assert loss.name == "stability_report/loss"
    assert [spike.step for spike in loss.spikes] == [201]
    assert run.of("stability_report/lr-1")[0] == (1, 0.01)
    # The log has more validations than this record.
    assert len(run.of("val_loss")) == 6
    assert facts_of(run).seconds == 75.0
    assert ("Ranks", "4 to 8 in 2 layers") in adapter_facts(run)


def test_a_log_comes_before_what_was_noted_at_validations(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    noted = {
        "val_loss": [[20, 4.0], [40, 3.0], [60, 2.0]],
        "train_acc": [[20, 0.1], [40, 0.2]],
        "loss": [[20, 0.1], [40, 0.2]],
        "alone": [[20, 5.0]],
    }
    write_record(tmp_path, steps=60, metrics=noted)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(30, 60):  # it was resumed from 30
            writer.add_scalar("train_acc", 0.5, step)
            writer.add_scalar("loss_step", 0.5, step)
        for step in (39, 59):
            writer.add_scalar("val_loss", 7.0, step)
    run = read_run(tmp_path)
    assert run.of("train_acc") == [(step + 1, 0.5) for step in range(30, 60)]
    assert run.of("val_loss") == [(20, 4.0), (40, 7.0), (60, 7.0)]
    assert run.of("alone") == [(20, 5.0)]
    assert "loss" not in run.series


def test_a_record_alone_is_a_run_with_all_of_its_optimizers(tmp_path):
    series = {
        "step": [1, 1, 2, 2],
        "optimizer": [0, 1, 0, 1],
        "loss": [1.0, 2.0, None, 4.0],
        "gradient_norm": [None] * 4,
        "seconds": [0.1, 0.2, 0.3, 0.4],
        "lr": [[0.1], [0.2], [0.1], []],
    }
    write_record(tmp_path, series=series, metrics={"val_loss": [[2, 0.5]]})
    run = read_run(tmp_path)
    assert run.of("stability_report/loss/1") == [(1, 2.0), (2, 4.0)]
    assert math.isnan(run.of("stability_report/loss")[1][1])
    assert "stability_report/gradient_norm" not in run.series
    assert run.of("val_loss") == [(2, 0.5)]


def test_the_files_of_instruments_and_sweeps(tmp_path):
    write_gap(tmp_path)
    write_numerics(tmp_path)
    sweep = {"cells": [{"precision": "e4m3", "lr": 0.1, "share": 0.5, "ended": 2}], "runs": [{"seed": 0}]}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    run = read_run(tmp_path)
    assert run.notes == []
    assert run.gap["names"] == {0: "classes 0, 1", 1: "classes 2, 3"}
    assert run.gap["curves"]["ema"][0][:2] == [(0, 0.0), (2, pytest.approx(0.2))]
    assert [report["step"] for report in run.numerics] == [10, 20, 30, 40, 50]
    assert run.sweep["cells"][0]["median"] is None


def test_tensorboard_events_are_read_with_their_times(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for begin, end, value in ((0, 50, 1.0), (40, 60, 2.0)):
        with SummaryWriter(str(tmp_path), filename_suffix=str(begin)) as writer:
            for step in range(begin, end):
                writer.add_scalar("train_loss", value, step, walltime=1000 + step + 100 * (value > 1))
            writer.add_scalar("hp_metric", -1, 0)
    run = read_run(tmp_path)
    assert run.notes == []
    assert run.of("train_loss") == [(s + 1, 1.0) for s in range(40)] + [(s + 1, 2.0) for s in range(40, 60)]
    assert "hp_metric" not in run.series
    assert run.seconds >= 100
    (tmp_path / "events.out.tfevents.3.broken").write_bytes(b"no event")
    assert read_run(tmp_path).of("train_loss")


def test_without_tensorboard_a_note_says_how_to_read_events(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    (tmp_path / "events.out.tfevents.1").touch()
    (note,) = read_run(tmp_path).notes
    assert "lightning-stable[tensorboard]" in note


def test_hyperparameters_with_objects_of_python_are_read(tmp_path):
    write_csv(tmp_path, [{"step": 0, "loss": 1}])
    (tmp_path / "hparams.yaml").write_text("a: 1\nb: !!python/object:torch.nn.ReLU\n  x: 2\nc: !!python/tuple [1]\n")
    assert read_run(tmp_path).hparams == {"a": 1, "b": "torch.nn.ReLU", "c": "tuple"}


def test_runs_are_found_below_a_folder_the_newest_first(tmp_path):
    import os

    for place, name in enumerate(["a/v0", "a/v1", "b"]):
        file = write_csv(tmp_path / name, [{"step": 0, "loss": 1}])
        os.utime(file, (1000 + place, 1000 + place))
    assert find_runs(tmp_path) == [tmp_path / "b", tmp_path / "a/v1", tmp_path / "a/v0"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    assert not has_files(tmp_path)


def test_settings_are_flat_and_their_differences_named(tmp_path):
    runs = [read_run(write_run(tmp_path / name, lr=rate)) for name, rate in (("a", 0.1), ("b", 0.2))]
    assert flat_settings(runs[0].config)["trainer.callbacks[EMA].decay"] == "0.9"
    assert differences([run.config for run in runs]) == [("model.init_args.lr", ["0.1", "0.2"])]


def test_adapters_are_told_from_the_config(tmp_path):
    callback = {
        "class_path": "lightning_stable.peft.adapters.Adapters",
        "init_args": {"init": "pissa", "config": {"class_path": "peft.LoraConfig", "init_args": {"r": 8}}},
    }
    write_csv(tmp_path, [{"step": 0, "loss": 1}])
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    assert adapter_facts(read_run(tmp_path)) == [
        ("Callback", "Adapters"),
        ("Init", "pissa"),
        ("Config", "LoraConfig"),
        ("r", "8"),
    ]


def test_points_are_thinned_with_their_extremes():
    points = [(step, math.sin(step / 500) + (step == 7777)) for step in range(20000)]
    kept = thin(points, 100)
    assert len(kept) <= 400
    assert points[7777] in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thin(points[:300], 100) == points[:300]


def test_a_value_at_an_earlier_step_drops_what_came_after():
    points = [(1, 1.0), (5, 2.0), (9, 3.0)]
    append(points, 5, 7.0)
    assert points == [(1, 1.0), (5, 7.0)]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_atomically(tmp_path / "a.json", as_json({"a": [1.0, math.nan, math.inf], "b": {"c": -math.inf}}))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.0, None, None], "b": {"c": None}}
    with pytest.raises(OSError, match="gone"):
        write_atomically(tmp_path / "gone" / "a.json", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
