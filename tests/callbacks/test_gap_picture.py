"""The picture of the stability gap: what is drawn, checked on the figure's own objects; where gaps begin and end."""

import math
import sys

import pytest
from gap_records import make_record
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_stable.callbacks._gap_picture import draw_gap, find_gaps, thin

LIVE, EMA = "#e07b39", "#1f5fa8"
SWITCHES = [{"task": 0, "step": 0}, {"task": 1, "step": 4}, {"task": 2, "step": 10}]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a record and return the figure."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))

    def draw(record, **options):
        path = tmp_path / "runs" / "gap" / "version_3" / "stability_gap.png"
        assert draw_gap(record, path, **options)
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size > 10_000
        return figures[-1]

    return draw


def curves(axis, color):
    """The lines of a weight set; a switch has two points, a mark one."""
    return [line for line in axis.lines if to_hex(line.get_color()) == color and line.get_marker() in ("None", None)]


def marks(axis):
    return {to_hex(line.get_color()): line.get_xydata().tolist() for line in axis.lines if line.get_marker() in "v^"}


def texts(axis):
    return [text.get_text() for text in axis.texts]


# ----------------------------------------------------------------------------- where gaps are


def test_a_gap_goes_from_the_switch_to_the_recovery():
    scores = {0: 0.2, 4: 1.0, 5: 0.4, 6: 0.2, 7: 0.9, 8: 0.93, 9: 0.5, 10: 0.96}
    (gap, _) = find_gaps([*scores.items(), (11, 0.9)], 0, SWITCHES, 0.9)
    assert (gap.start, gap.reference) == (4, 1.0)
    assert gap.lowest == (6, 0.2)
    assert gap.depth == pytest.approx(0.8)
    assert gap.end == 8, "0.2 + 0.9 * 0.8 is 0.92"
    assert gap.points == [(4, 1.0), (5, 0.4), (6, 0.2), (7, 0.9), (8, 0.93)]
    (gap, _) = find_gaps([*scores.items(), (11, 0.9)], 0, SWITCHES, 0.5)
    assert gap.end == 7, "0.2 + 0.5 * 0.8 is 0.6"


def test_a_gap_that_stays_open_ends_with_the_next_switch():
    points = [(4, 1.0), (5, 0.5), (10, 0.6), (11, 1.0)]
    first, second = find_gaps(points, 0, SWITCHES, 0.9)
    assert first.end is None
    assert first.points[-1] == (10, 0.6)
    assert (second.start, second.reference, second.depth) == (10, 0.6, 0.0)


def test_only_past_tasks_have_gaps():
    points = [(4, 0.1), (5, 0.0), (10, 0.9), (11, 0.5)]
    (gap,) = find_gaps(points, 1, SWITCHES, 0.9)
    assert gap.start == 10
    assert not find_gaps(points, 2, SWITCHES, 0.9)


def test_a_task_that_comes_back_has_no_gap_while_it_is_learned():
    switches = [*SWITCHES, {"task": 0, "step": 14}]
    points = [(step, 1.0 if step % 2 else 0.5) for step in range(20)]
    assert [gap.start for gap in find_gaps(points, 0, switches, 0.9)] == [4, 10]
    assert [gap.start for gap in find_gaps(points, 1, switches, 0.9)] == [10, 14]


def test_where_lower_is_better_a_gap_is_a_rise():
    (gap, _) = find_gaps([(4, 0.5), (5, 2.5), (6, 0.75), (7, 0.7), (11, 1.0)], 0, SWITCHES, 0.9, sign=-1)
    assert gap.lowest == (5, 2.5)
    assert gap.depth == 2.0
    assert gap.end == 7


def test_the_first_evaluation_of_the_task_at_its_switch_counts():
    (gap,) = find_gaps([(3, 0.9), (4, 0.95), (4, 1.0), (5, 0.5)], 0, SWITCHES[:2], 0.9)
    assert gap.reference == 1.0


# ----------------------------------------------------------------------------- thinning


def test_thinning_keeps_ends_and_extremes():
    points = [(step, 1.0) for step in range(100_000)]
    points[31_234] = (31_234, 0.0)
    points[77_777] = (77_777, 3.0)
    points[50_000] = (50_000, math.nan)
    kept = thin(points, 100)
    assert len(kept) <= 400
    assert {points[0], points[-1], points[31_234], points[77_777]} <= set(kept)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


def test_short_lines_and_those_of_nothing_but_nan_are_left():
    short = [(step, float(step)) for step in range(40)]
    assert thin(short, 10) == short
    missing = [(step, math.nan) for step in range(1000)]
    assert 1 <= len(thin(missing, 10)) <= 40


# ----------------------------------------------------------------------------- the picture


def test_each_task_has_a_panel_with_both_weight_sets(drawn):
    figure = drawn(make_record())
    first, second, norms = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["classes 0, 1", "classes 2, 3", "gradient norm"]
    (live,), (ema,) = curves(first, LIVE), curves(first, EMA)
    assert live.get_linewidth() < ema.get_linewidth()
    assert live.get_ydata()[:4].tolist() == [50, 75, 100, 25]
    assert math.isnan(live.get_ydata()[5]), "a score that failed leaves a hole"
    assert curves(second, LIVE)[0].get_xdata().tolist() == [4, 6, 8], "not from the time before the task began"
    assert not curves(second, EMA)
    assert len(norms.lines) == 3, "a switch and two norms"
    assert norms.get_yscale() == "log"


def test_switches_gaps_and_minima_are_marked(drawn):
    first, second, _ = drawn(make_record()).axes
    for axis in (first, second):
        assert [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"] == [4]
    assert texts(first)[-2:] == ["task 0", "task 1"]
    assert marks(first) == {LIVE: [[5, 25]], EMA: [[5, 75]]}
    assert {"25", "75"} <= set(texts(first))
    assert not marks(second)
    assert len(first.collections) == 2, "a shade for each weight set"
    live, ema = first.collections
    assert (live.get_hatch(), ema.get_hatch()) == (None, "/////"), "what lies on each other can be told apart"
    assert to_hex(live.get_facecolor()[0]) == LIVE
    assert to_hex(ema.get_edgecolor()[0]) == EMA
    assert len(ema.get_facecolor()) == 0
    assert first.collections[0].get_datalim(first.transData).bounds == pytest.approx((4, 25, 4, 75))


def test_the_legend_says_everything_once_and_the_title_where(drawn):
    figure = drawn(make_record())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "live weights",
        "EMA weights",
        "task is learned",
        "gap, live",
        "gap, EMA",
        "lowest since the switch",
    ]
    assert [patch.get_hatch() for patch in legend.get_patches()] == [None, None, "/////"]
    assert legend.get_title().get_text() == "Stability gap: gap/version_3"
    assert figure.get_supylabel() == "accuracy, %"
    assert drawn(make_record(), title="mine").legends[0].get_title().get_text() == "mine"
    assert figure.dpi == 150


def test_one_weight_set_is_drawn_bold_and_alone(drawn):
    record = make_record(gradients=None)
    record["series"]["ema"] = []
    figure = drawn(record)
    assert len(figure.axes) == 2
    assert curves(figure.axes[0], LIVE)[0].get_linewidth() > 1.5
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["live weights", "task is learned", "gap", "lowest since the switch"]


def only(scores, task=0, **changes):
    """A record of one task that is scored at steps 0, 1, 2, ..., and another one that begins at step 4."""
    series = {"live": [{"task": task, "steps": list(range(len(scores))), "scores": scores}]}
    return make_record(series=series, gradients=None, **changes)


def test_what_never_falls_below_the_switch_has_no_mark(drawn):
    (axis,) = drawn(only([0.1, 0.3, 0.4, 0.5, 0.5, 0.7, 0.8, 0.9, 1.0])).axes
    assert not axis.collections
    assert not marks(axis)
    assert texts(axis) == ["task 0", "task 1"]


def test_a_fall_that_is_smaller_than_a_mark_has_none(drawn):
    (axis,) = drawn(only([0.0, 0.5, 0.9, 1.0, 1.0, 0.97, 1.0, 1.0, 1.0])).axes
    assert len(axis.collections) == 1
    assert not marks(axis)


def test_the_axis_does_not_go_below_zero_without_need(drawn):
    assert drawn(make_record()).axes[0].get_ylim()[0] == 0
    assert drawn(only([0.5, 0.7, 0.9, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9])).axes[0].get_ylim()[0] > 30
    below = only([-0.5, 0.7, 0.9, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9], score="margin")
    assert drawn(below).axes[0].get_ylim()[0] < -0.5


def test_a_number_at_the_bottom_stands_beside_its_mark_and_in_the_panel(drawn):
    figure = drawn(only([0.5, 0.7, 1.0, 1.0, 1.0, 0.5, 0.0, 0.5, 1.0]))
    (axis,) = figure.axes
    (number,) = [text for text in axis.texts if text.get_text() == "0"]
    assert (number.get_ha(), number.get_va()) == ("left", "bottom")
    box, panel = number.get_window_extent(), axis.get_window_extent()
    assert panel.y0 - 1 < box.y0 < box.y1 < panel.y1


@pytest.mark.parametrize(("low", "side"), [(401, "left"), (799, "right"), (600, "center"), (1200, "right")])
def test_a_number_does_not_stand_on_a_switch(low, side, drawn):
    scores = [0.5 if step == low else 1.0 for step in range(1201)]
    scores[0] = 0.0
    switches = [{"task": 0, "step": 0}, {"task": 1, "step": 400}, {"task": 1, "step": 800}]
    (axis,) = drawn(only(scores, switches=switches)).axes
    (number,) = [text for text in axis.texts if text.get_text() == "50"]
    assert number.get_ha() == side


def test_one_weight_set_of_a_task_looks_as_the_legend_says(drawn):
    record = make_record(gradients=None)
    record["series"]["live"] = record["series"]["live"][1:]
    first = drawn(record).axes[0]
    assert [shade.get_hatch() for shade in first.collections] == ["/////"]


def test_the_share_of_the_recovery_is_that_of_the_record(drawn):
    scores = [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.6, 1.0, 1.0]
    widths = []
    for share in ({}, {"recovery_share": 0.5}):
        axis = drawn(only(scores, **share)).axes[0]
        widths.append(axis.collections[0].get_datalim(axis.transData).width)
    assert widths == pytest.approx([3, 2])


def test_a_loss_is_drawn_the_other_way_up(drawn):
    record = make_record(score="val_loss", higher_is_better=False)
    record["series"]["live"][0]["scores"] = [3.0, 1.0, 0.125, 2.0, 1.0, None, 0.125]
    figure = drawn(record)
    assert figure.get_supylabel() == "val_loss"
    assert marks(figure.axes[0])[LIVE] == [[5, 2.0]]
    assert figure.legends[0].get_texts()[-1].get_text() == "highest since the switch"


def test_a_wide_range_of_losses_is_logarithmic(drawn):
    record = make_record(score="perplexity", higher_is_better=False)
    for line in record["series"]["live"]:
        line["scores"] = [None if score is None else 1 + 100 * score for score in line["scores"]]
    assert drawn(record).axes[0].get_yscale() == "log"


def test_all_tasks_have_one_range(drawn):
    figure = drawn(make_record())
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_of_many_tasks_the_first_ten_are_shown_and_it_is_said(drawn):
    tasks = [{"task": task, "name": f"a long name of the task {task}", "samples": 1} for task in range(14)]
    switches = [{"task": task, "step": 2 * task} for task in range(14)]
    lines = [
        {"task": task, "steps": list(range(2 * task, 29)), "scores": [0.5] * (29 - 2 * task)} for task in range(14)
    ]
    figure = drawn(make_record(tasks=tasks, switches=switches, series={"live": lines}, gradients=None))
    assert len(figure.axes) == 10
    assert [text.get_text() for text in figure.texts if "14" in text.get_text()] == ["the first 10 of 14 tasks"]
    assert texts(figure.axes[0]) == [str(task) for task in range(14)]
    assert "\n" in figure.axes[0].get_ylabel()


def test_numbers_do_not_lie_on_each_other(drawn):
    count = 120
    switches = [{"task": place % 2, "step": 100 * place} for place in range(count)]
    steps = list(range(0, 100 * count + 1, 10))
    lines = [{"task": 0, "steps": steps, "scores": [0.5 if step % 200 == 110 else 0.9 for step in steps]}]
    (axis,) = drawn(make_record(switches=switches, series={"live": lines}, gradients=None)).axes
    places = [text.xy[0] for text in axis.texts if text.get_text() == "50"]
    assert 10 < len(places) < count // 2
    assert min(b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) > 0.02 * 100 * count


@pytest.mark.parametrize("series", [{}, {"live": []}, {"live": [{"task": 0, "steps": [0, 1], "scores": [None, None]}]}])
def test_there_is_no_picture_of_nothing(series, tmp_path):
    assert not draw_gap(make_record(series=series), tmp_path / "gap.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-stable\[plots\]'"):
        draw_gap(make_record(), tmp_path / "gap.png")


def test_pyplot_stays_out(drawn):
    sys.modules.pop("matplotlib.pyplot", None)
    drawn(make_record())
    assert "matplotlib.pyplot" not in sys.modules
