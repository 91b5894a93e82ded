"""The page: what is on it, what is left out, and that it is whole in itself."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from report.report_runs import write_csv, write_gap, write_numerics, write_record, write_run

from lightning_stable._report.charts import phase_spans, smoothed
from lightning_stable._report.page import write_page, write_pictures
from lightning_stable._report.read import read_run


class Checked(HTMLParser):
    """Collects ids, links, headings and what stands in the elements, and complains of elements that are not closed."""

    VOID = ("meta", "link", "br", "wbr", "img", "path", "use", "rect", "image")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open, self.headings, self.loaded = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.loaded += [given["src"]] if "src" in given else []
        assert tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A run with everything, and its page."""
    folder = write_run(tmp_path_factory.mktemp("whole") / "runs" / "v0", name="<b>&amp;")
    write_gap(folder)
    write_numerics(folder)
    write_record(folder)
    run = read_run(folder)
    run.series["spike_guard/skipped"] = [(1, 0.0), (200, 1.0), (300, 2.0)]
    run.series["spike_guard/clipped"] = [(1, 0.0), (300, 0.0)]
    run.series["my_own"] = [(1, 1.0), (2, math.nan), (3, 4.0)]
    page = folder / "report.html"
    assert write_page([run], page).without_pictures == ""
    return run, page.read_text(encoding="utf-8")


def test_a_page_is_whole_in_itself(everything):
    _, text = everything
    page = Checked(text)
    assert len(set(page.ids)) == len(page.ids)
    assert page.loaded == []
    anchors = [link for link in page.links if link.startswith("#")]
    assert {link.removeprefix("#") for link in anchors} <= set(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"https?:", text)
    assert "url(#" not in text.replace("url(#p", "")
    for needed in ('name="viewport"', "prefers-color-scheme: dark", "@media print", "var(--ink)"):
        assert needed in text


def test_a_page_has_a_section_for_everything_that_is_there(everything):
    _, text = everything
    assert Checked(text).headings == [
        "Loss",
        "Validation",
        "Learning rate and speed",
        "Gradients and what acted on them",
        "Stability gap",
        "Numerics",
        "Local steps and exchanges",
        "Adapters",
        "Everything else that was logged",
        "Events",
        "Settings",
        "Versions and hardware",
        "How to read this page",
    ]
    for said in (
        "1 min 15 s",
        "4 to 8 in 2 layers",
        "SpikeGuard: skipped",
        "my_own",
        "PrecisionFallback: high precision",
        "Underflow of gradients",
        "classes 2, 3",
        "A spike is a value far above those before it.",
        "Rounds that ended",
        "300 ms, others 250 ms",
        "&lt;b&gt;&amp;amp;",
    ):
        assert said in text, said
    assert "SpikeGuard: clipped" not in text  # it never did


def test_sections_without_data_are_left_out(tmp_path):
    run = read_run(write_csv(tmp_path, [{"step": step, "loss": 1 / (step + 1)} for step in range(9)]).parent)
    write_page([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert Checked(text).headings == ["Loss", "How to read this page"]
    assert "Not recorded for this run: versions, hardware, time and speed. The callback StabilityReport" in text
    assert text.count("<svg") == 2  # of a desk and of a phone


def test_a_loss_that_is_no_number_is_a_page_that_says_so(tmp_path):
    rows = [{"step": step, "train_loss": 2.0 if step < 60 else "nan"} for step in range(100)]
    write_page([read_run(write_csv(tmp_path, rows).parent)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Diverged: the loss is not a finite number from step 61 on." in text
    assert "not finite, 40 times" in text


def test_several_runs_are_compared(tmp_path):
    runs = []
    for name, rate in (("first", 0.1), ("second", 0.3)):
        folder = write_run(tmp_path / name, spikes=(200,) if name == "first" else (), lr=rate)
        runs.append(read_run(folder, name))
    write_page(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Checked(text)
    assert len(set(page.ids)) == len(page.ids)
    assert "2 runs compared" in text
    assert "model.<wbr>init_<wbr>args.<wbr>lr</th><td>0.1</td><td>0.3</td>" in text
    assert re.search(r">first</th>.*<td>1</td><td>no</td>", text)
    for chart in re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL):
        if "<figcaption>val_loss_live" not in chart:
            assert ">first</text>" in chart
            assert ">second</text>" in chart


def test_odd_names_and_values_are_drawn_as_they_are(tmp_path):
    odd = {
        "train_loss": [1e30, -1e30, math.inf, 0.0],
        "val_$a$_^": [1.0, 2.0, math.nan, 3.0],
        "val\\loss": [1.0, 2.0, 3.0, 4.0],
        "_grad_norm": [0.0, 0.0, 0.0, 0.0],
        "<script>": [math.nan, math.inf, 1.0, -1.0],
        "lr-SGD": [0.0, 0.0, 0.0, 0.0],
        "never": [math.nan] * 4,
        "counts": [10**15, 10**16, 10**17, 10**18],
    }
    rows = [{"step": 10**9 * step, **{name: odd[name][step] for name in odd}} for step in range(4)]
    folder = write_csv(tmp_path / "_x", rows).parent
    runs = [read_run(folder, name) for name in ("_one$", "two$")]
    write_page(runs[:1], tmp_path / "one.html")
    write_page(runs, tmp_path / "two.html")
    for name in ("one", "two"):
        text = (tmp_path / f"{name}.html").read_text()
        assert 'aria-label="val\\loss"' in text
        assert "could not be drawn" not in text
        assert Checked(text).headings
        assert "val_$a$_^" in text
    assert "_one$</text>" in text
    assert "two$</text>" in text


def test_a_picture_that_cannot_be_drawn_is_a_note(tmp_path):
    values = [1e307 / 10**step for step in range(90)]
    rows = [{"step": step, "train_loss": value, "other": step} for step, value in enumerate(values)]
    written = write_page([read_run(write_csv(tmp_path, rows).parent)], tmp_path / "report.html")
    assert written.without_pictures == ""
    (note,) = written.notes
    assert note.startswith("The picture 'Training loss' could not be drawn: OverflowError")
    assert "<figcaption>other" in (tmp_path / "report.html").read_text()


def test_a_failing_picture_leaves_the_others(tmp_path, monkeypatch):
    def draw(chart, prefix, wide):
        if chart.name == "loss":
            raise OverflowError("too large")
        return f'<svg id="{prefix}"></svg>'

    monkeypatch.setattr("lightning_stable._report.page.as_svg", draw)
    written = write_page([read_run(write_run(tmp_path, steps=60))], tmp_path / "report.html")
    assert written.notes == ("The picture 'Training loss' could not be drawn: OverflowError: too large",)
    text = (tmp_path / "report.html").read_text()
    assert "could not be drawn: OverflowError: too large" in text
    assert "<figcaption>Learning rate" in text
    assert "<figcaption>Training loss" not in text


def test_a_picture_of_some_of_the_runs_says_of_which(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_stable._report.page.as_svg", lambda chart, prefix, wide: "<svg></svg>")
    write_record(tmp_path / "first", steps=60)
    runs = [read_run(folder, folder.name) for folder in (tmp_path / "first", write_run(tmp_path / "second", steps=120))]
    write_page(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    shown = dict(re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", text, re.DOTALL))
    assert "Only first has these values." in shown["Speed"]
    assert "Only second has these values." in shown["val_accuracy"]
    assert "Only" not in shown["Training loss"]
    assert "Not recorded for second: versions, hardware, time and speed." in text
    assert re.search(r">torch</th><td>[^<]+</td></tr>", text)  # one column, and once why there is no second one
    assert text.count("Nothing of this is recorded for second.") == 3
    assert "not known" not in text


def test_a_picture_alone_takes_the_width_and_phases_have_names(everything, tmp_path):
    _, text = everything
    first = text[: text.index("</figure>")]
    for phase in ("warmup", "stable"):
        assert f">{phase}</text>" in first
    rows = [{"step": step, "loss": 1 / (step + 1), "lr-SGD": 0.1} for step in range(9)]
    write_page([read_run(write_csv(tmp_path, rows).parent)], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count('<figure class="wide">') == 2


def test_several_runs_with_instruments_have_theirs_side_by_side(tmp_path, monkeypatch):
    # How each picture is drawn is seen above.
    monkeypatch.setattr(
        "lightning_stable._report.page.as_svg", lambda chart, prefix, wide: f'<svg id="{prefix}"></svg>'
    )
    runs = []
    for name in ("first", "second"):
        folder = write_run(tmp_path / name, steps=60, spikes=())
        write_gap(folder)
        write_numerics(folder)
        write_record(folder, steps=60)
        runs.append(read_run(folder, name))
    write_page(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Checked(text)
    assert len(set(page.ids)) == len(page.ids)
    assert "second: Underflow of weights" in text
    for row in ("Ranks", "Rounds that ended", "torch"):
        assert re.search(rf">{row}</th><td>[^<]+</td><td>[^<]+</td>", text), row


def test_a_sweep_is_a_table(tmp_path):
    cells = [
        {"precision": "e4m3", "lr": 0.1, "share": 0.5, "ended": 2, "failed": 1, "median": 0.25},
        {"precision": "32-true", "lr": 0.1, "share": None, "ended": 0, "failed": 0, "median": None},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells, "runs": [{}, {}, {}]}))
    write_page([read_run(tmp_path)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert '<th scope="row">e4m3</th><td>0.1</td><td>50% of 2</td><td>0.25</td><td>1</td>' in text
    assert "no run" in text


def test_pictures_are_written_beside_the_page(everything, tmp_path):
    run, _ = everything
    written = write_pictures([run], tmp_path / "report.html")
    assert {path.parent.name for path in written} == {"report_pictures"}
    assert {"loss.png", "learning_rate.png", "stability_gap.png"} <= {path.name for path in written}
    assert len(set(written)) == len(written)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_pictures_of_long_and_like_names_have_files_of_their_own(tmp_path):
    names = ["val_" + 300 * "x" + end for end in "ab"] + ["val_" + 200 * "\u8a9e", "val_a", "val_a!", "val_a_2", "!"]
    rows = [{"step": step, **dict.fromkeys(names, step)} for step in range(2)]
    written = write_pictures([read_run(write_csv(tmp_path, rows).parent)], tmp_path / "report.html")
    assert len(set(written)) == len(names)
    assert all(path.is_file() and len(path.name.encode()) < 255 for path in written)
    assert tmp_path / "report_pictures" / "picture.png" in written


def test_a_run_in_progress_waits_for_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_stable._report.page.as_svg", lambda chart, prefix, wide: "<svg></svg>")
    rows = [{"step": step, "stability_report/loss": 1.0} for step in range(3)]
    write_page([read_run(write_csv(tmp_path, rows).parent)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "They are in stability_report.json, which is missing: StabilityReport writes it every half a minute" in text
    assert "addon:stability_report" not in text


def test_without_matplotlib_the_page_has_its_tables(everything, tmp_path, monkeypatch):
    run, _ = everything
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    written = write_page([run], tmp_path / "report.html")
    assert "lightning-stable[plots]" in written.without_pictures
    text = (tmp_path / "report.html").read_text()
    assert "<svg" not in text
    assert "Spikes of the loss" in text
    assert re.search(r"This page has no pictures\. .*pip install &#39;lightning-stable\[plots\]&#39;</p>", text)
    assert "Validation" not in Checked(text).headings  # it has nothing but pictures
    with pytest.raises(ModuleNotFoundError, match="plots"):
        write_pictures([run], tmp_path / "report.html")


def test_phases_come_from_the_record_or_from_the_log(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    assert phase_spans(run) == [(0, 31, "warmup"), (31, 241, "stable"), (241, 300, "decay")]
    write_record(tmp_path / "a")
    assert phase_spans(read_run(tmp_path / "a")) == [(0, 30.0, "warmup"), (30, 300.0, "stable")]


def test_a_smoothed_line_is_the_median_around_each_value():
    points = [(step, 100.0 if step == 50 else float(step % 3)) for step in range(1, 121)]
    assert smoothed(points)[49] == (50, 1.0)
    assert smoothed(points[:99]) == points[:99]
    assert len(smoothed([(step, 1.0) for step in range(50000)])) <= 2100
