"""The headline, the comparison and the ranges of pictures: that each number and line says what it is."""

import pytest
from report.report_runs import record_of, write_csv, write_record, write_run

from lightning_stable._report.charts import loss_chart, validation_charts
from lightning_stable._report.draw import _columns, range_of
from lightning_stable._report.facts import facts_of
from lightning_stable._report.page import write_page
from lightning_stable._report.read import read_run
from lightning_stable._report.tables import differing_settings, final_figures, tiles
from lightning_stable._report.weights import AVERAGED, LIVE_WEIGHTS, validated_weights


def run_of(folder, values, **more):
    rows = [{"step": step, "train_loss": value, **more} for step, value in enumerate(values)]
    return read_run(write_csv(folder, rows).parent, folder.name)


def averaging(path, **given):
    return {"trainer": {"callbacks": [{"class_path": path, "init_args": given}]}}


def test_the_headline_says_what_its_numbers_are(tmp_path):
    noisy = [3.0] * 100 + [0.5] + [1.0] * 19
    for values, value, remark in (
        ([*noisy, 7.0], "1", "median of the last 5%\nlast value 7\nlowest 0.5"),
        (noisy[81:], "1", "last value\nlowest 0.5"),
        ([2.0, 1.0, "nan"], "not finite", "last value\nlowest 1"),
    ):
        run = run_of(tmp_path, values)
        assert ("Training loss", value, remark) in tiles(run, facts_of(run))
    run = read_run(write_run(tmp_path / "both"))
    (loss,) = [tile for tile in tiles(run, facts_of(run)) if tile[0] == "val_loss"]
    assert loss[1] == f"{run.of('val_loss')[-1][1]:.4g}"
    assert loss[2].startswith("last value, averaged weights\nbest ")


def test_of_many_values_the_median_is_bold_and_of_few_there_is_one_line(tmp_path):
    many = loss_chart([run_of(tmp_path / "many", [1.0] * 100)]).panels[0].lines
    assert [(line.label, line.faint, line.bold) for line in many] == [
        ("training, single values", True, False),
        ("training, running median", False, True),
    ]
    few = loss_chart([run_of(tmp_path / "few", [1.0] * 40)]).panels[0].lines
    assert [(line.label, line.faint) for line in few] == [("training", False)]


@pytest.mark.parametrize(
    ("odd", "log", "low", "text"),
    [
        (0.02, True, 0.02, ""),
        (1e-9, True, 0.5, "Values below 0.0005 are cut."),
        (0.0, True, 0.5, "Values below 0.0005 are cut."),
        (-0.1, False, -0.1, ""),
        (900.0, False, 0.5, "Triangles are spikes; those at the upper edge are above it."),
    ],
)
def test_the_axis_holds_single_values_or_says_which_it_cuts(odd, log, low, text, tmp_path):
    steep = 10.0 if log or odd < 0 else 0.6
    chart = loss_chart([run_of(tmp_path, [steep] * 40 + [0.5] * 60 + [odd] + [0.5] * 60)])
    assert chart.text == text
    (panel,) = chart.panels
    assert panel.log == log
    bottom, top = range_of(panel)
    assert bottom < low
    assert low - bottom < 0.25 * low if log else True
    assert steep < top < 100


def test_runs_without_settings_are_named_once(tmp_path):
    runs = [read_run(write_run(tmp_path / name, steps=9, lr=rate), name) for name, rate in (("a", 0.1), ("b", 0.2))]
    runs += [run_of(tmp_path / name, [1.0]) for name in ("c", "d")]
    (table,), texts = differing_settings(runs)
    assert table.head == ["setting", "a", "b"]
    assert table.rows == [["model.init_args.lr", "0.1", "0.2"]]
    assert texts == ["No settings are recorded for c, d."]
    assert differing_settings(runs[1:]) == ([], texts)
    assert differing_settings(runs[:1]) == ([], [])


def test_hyperparameters_are_compared_with_hyperparameters(tmp_path):
    runs = [read_run(write_run(tmp_path / "a", steps=9), "a"), run_of(tmp_path / "b", [1.0])]
    runs[0].hparams, runs[1].hparams = {"lr": 0.1, "_instantiator": "x"}, {"lr": 0.3}
    (table,), texts = differing_settings(runs)
    assert table.rows == [["lr", "0.1", "0.3"]]
    assert texts == ["No config.yaml is recorded for b: only the module's hyperparameters are compared."]


@pytest.mark.parametrize(
    ("config", "record", "weights"),
    [
        ({}, {}, ""),
        ({"trainer": {}}, {}, LIVE_WEIGHTS),
        (averaging("lightning_stable.callbacks.ema.EMA"), {}, AVERAGED),
        (averaging("lightning_stable.callbacks.ema.EMA", validate_with="live"), {}, LIVE_WEIGHTS),
        (averaging("lightning.pytorch.callbacks.EMAWeightAveraging"), {}, AVERAGED),
        (averaging("mine.MyEMA"), {}, ""),
        (averaging("mine.SemanticSearch"), {}, LIVE_WEIGHTS),
        ({}, {"validated_weights": "average"}, AVERAGED),
        ({"trainer": {}}, {"validated_weights": ""}, ""),
        ({}, {"validated_weights": "live"}, LIVE_WEIGHTS),
    ],
)
def test_which_weights_were_validated(config, record, weights, tmp_path):
    run = run_of(tmp_path, [1.0], val_acc=0.5)
    run.config, run.record = config, record
    assert validated_weights(run, "val_acc") == weights


def test_averaged_values_beside_live_ones_are_marked(tmp_path):
    runs = [read_run(write_run(tmp_path / name, steps=100), name) for name in ("average", "plain")]
    runs[1].config["trainer"]["callbacks"] = []
    del runs[1].series["val_loss_live"]
    table = final_figures(runs)
    cells = [dict(zip(table.head, row, strict=True))["last val_loss"].partition(" ")[2] for row in table.rows]
    assert cells == ["(averaged)", "(live)"]
    assert table.caption == "In brackets: which weights were validated."
    (chart,) = [chart for chart in validation_charts(runs) if chart.name == "val_loss"]
    labels = [line.label for line in chart.panels[0].lines]
    assert labels == ["average (averaged weights)", "plain (live weights)"]
    assert final_figures(runs[1:] * 2).caption == ""


def test_only_a_number_is_marked_with_its_weights(tmp_path):
    runs = [run_of(tmp_path / name, [1.0], val_loss=end) for name, end in (("a", 0.5), ("b", "nan"), ("c", 0.25))]
    for run, given in zip(runs, ("both", "live", "live"), strict=True):
        run.config = averaging("lightning_stable.callbacks.ema.EMA", validate_with=given)
    table = final_figures(runs)
    place = table.head.index("last val_loss")
    assert [row[place] for row in table.rows] == ["0.5 (averaged)", "-", "0.25 (live)"]


def test_the_time_of_event_files_is_not_said_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_stable._report.page.as_svg", lambda chart, prefix, wide: "<svg></svg>")
    run = run_of(tmp_path, [1.0] * 11)
    run.seconds = 4.0
    assert ("Time", "4 s", "from the first to the last log\n2.5 steps a second") in tiles(run, facts_of(run))
    write_page([run], tmp_path / "page.html")
    assert "Not recorded for this run: versions, hardware and the speed over the run." in (
        tmp_path / "page.html"
    ).read_text(encoding="utf-8")


def test_a_legend_has_the_columns_that_fit():
    assert _columns(["ab", "cd"], 16) == 2
    assert _columns(["ab", "cd"], 15) == 1
    assert _columns(["long label", "ab", "cd", "ef"], 24) == 2  # two rows: 16 and 8
    assert _columns(["a" * 99], 9) == 1


def test_a_spike_that_the_record_has_is_outside_the_range(tmp_path):
    write_record(tmp_path)
    assert record_of()["spikes"]["loss"] == [[201, 9.0, 1.2]]
    (panel,) = loss_chart([read_run(tmp_path)]).panels
    assert 3.0 < range_of(panel)[1] < 9.0


@pytest.mark.parametrize("other", [60, 61], ids=["at one step", "at two steps"])
def test_spikes_of_two_runs_are_outside_the_range(other, tmp_path):
    runs = []
    for name, place, spike in (("a", 60, 500.0), ("b", other, 6.0)):
        values = [2.0 - 0.01 * step for step in range(90)]
        values[place] = spike
        runs.append(run_of(tmp_path / name, values))
    (panel,) = loss_chart(runs).panels
    assert sorted(panel.spikes) == sorted([(61, 500.0), (other + 1, 6.0)])
    assert 2.0 < range_of(panel)[1] < 6.0
