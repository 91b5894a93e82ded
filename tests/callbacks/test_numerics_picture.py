"""The picture of NumericsMonitor: which cells it has, checked on the figure's own objects."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from lightning_stable.callbacks._numerics_picture import draw_numerics

OPERANDS = ("weights", "activations", "gradients")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (drawn.append(self), save(self, *a, **kw)))
    return drawn


def a_record(layers: int = 3, reports: int = 5) -> dict[str, Any]:
    rows = [[f"layer.{number}", operand] for number in range(layers) for operand in OPERANDS]
    values = torch.rand(reports, len(rows), 4, generator=torch.Generator().manual_seed(1))
    return {"rows": rows, "steps": [10 * (number + 1) for number in range(reports)], "values": values}


@pytest.mark.parametrize("measure", ["underflow", "saturation", "sqnr", "absmax"])
def test_the_picture_is_a_map_of_layers_and_steps(measure: str, figures: list[Figure]) -> None:
    record = a_record()
    column = ["underflow", "saturation", "sqnr", "absmax"].index(measure)
    record["values"][2, 1, column] = math.nan  # the activations of the first layer were not seen then
    record["values"][3, 4, column] = 0.0
    assert draw_numerics(record, "runs/x/numerics.png", measure)
    maps = [axis for axis in figures[0].axes if axis.get_title()]
    assert [axis.get_title() for axis in maps] == list(OPERANDS)
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["layer.0", "layer.1", "layer.2"]
    for place, axis in enumerate(maps):
        (mesh,) = axis.collections
        cells = mesh.get_array()
        assert cells.shape == (3, 5)
        for line in range(3):
            for report in range(5):
                value = float(record["values"][report, 3 * line + place, column])
                if math.isnan(value):
                    assert cells.mask[line, report]
                elif value > 0:
                    assert float(cells[line, report]) == pytest.approx(value)
        assert list(mesh.get_coordinates()[0, :, 0]) == [0, 10, 20, 30, 40, 50]
    assert Path("runs/x/numerics.png").read_bytes()[:4] == b"\x89PNG"


def test_many_reports_share_columns_and_many_layers_are_the_worst(figures: list[Figure]) -> None:
    record = a_record(layers=70, reports=1000)
    record["values"][:] = 0.01
    record["values"][501, 3 * 66 + 2, 0] = 0.5
    assert draw_numerics(record, "many.png")
    (mesh,) = figures[0].axes[2].collections
    assert mesh.get_array().shape == (60, 400)
    assert float(mesh.get_array().max()) == 0.5
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert "layer.66" in names
    assert any("10 more" in text.get_text() for text in figures[0].texts)


@pytest.mark.parametrize("measure", ["underflow", "saturation", "sqnr", "absmax"])
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_all_that_is_written_is_within_the_picture(layers: int, measure: str, figures: list[Figure]) -> None:
    assert draw_numerics(a_record(layers), "small.png", measure)
    (figure,) = figures
    whole = figure.bbox
    bar = figure.axes[-1]
    for text in (bar.yaxis.label, *figure.texts):
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, text


def test_nothing_to_draw() -> None:
    record = a_record()
    record["values"][:] = math.nan
    assert not draw_numerics(record, "none.png")
    assert not Path("none.png").exists()
