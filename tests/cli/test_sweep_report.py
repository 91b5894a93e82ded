"""What a sweep says: which runs diverged, and the table."""

import pytest

from lightning_stable.cli._sweep_grid import make_grid
from lightning_stable.cli._sweep_report import divergence, make_cells, markdown_table


@pytest.mark.parametrize(
    ("initial", "best", "final", "expected"),
    [
        (2.3, 0.1, 0.15, False),  # a little worse than its best, next to what it has learnt
        (2.3, 0.1, 0.64, False),
        (2.3, 0.1, 0.66, True),  # 0.1 + 0.25 * 2.2 = 0.65
        (2.3, 0.1, None, True),
        (2.3, None, None, True),
        (2.3, 2.4, 2.35, False),  # learnt nothing: noise
        (2.3, 2.4, 2.4, True),  # 2.3 + 0.25 * 0.23 = 2.3575
        (None, 1.0, 1.2, False),  # its first loss was not finite: the first value that was measured stands for it
        (None, 1.0, 1.6, True),  # 1.0 + 0.25 * 2 = 1.5
        (-1.0, -5.0, -4.5, False),
        (-1.0, -5.0, -3.9, True),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_when_a_run_has_diverged(initial, best, final, expected):
    record = {"metric": "val_loss", "initial": initial, "best": best, "final": final, "curve": [[1, None], [2, 3.0]]}
    assert bool(divergence(record)) is expected
    if final is not None and initial is not None:
        assert not divergence(record, 1e9)


def test_a_cell_of_failed_runs_has_no_share():
    runs = make_grid(["int8"], [0.1, 0.2], [0])
    cells = make_cells(runs, {}, runs[:1])
    assert cells["int8", 0.1].share is None
    assert "no run; 1 failed" in markdown_table(cells, "val_loss")
