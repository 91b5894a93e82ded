"""The runs of a sweep: seeds, order, and names of folders."""

import itertools

from lightning_stable.cli._sweep_grid import Run, make_grid, parse_seeds
from lightning_stable.cli._sweep_precision import HOST_PRECISIONS


def test_seeds_and_order():
    assert parse_seeds([3]) == [0, 1, 2]
    assert parse_seeds([3, 7]) == [3, 7]
    runs = make_grid(["e8m7", "e8m3"], [0.1, 0.2], [1, 0])
    assert runs[:3] == [Run("e8m7", 0.1, 1), Run("e8m7", 0.2, 1), Run("e8m3", 0.1, 1)]
    assert len({run.name for run in runs}) == 8


def test_each_run_has_a_folder_of_its_own():
    blocks, others = ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e2m3"], ["e5m2", "e2m3", "int4"]
    pairs = [f"{both}/{gradients}" for both, gradients in itertools.product(blocks, blocks)]
    mixed = [f"{both}/{gradients}" for both, gradients in itertools.product(others, blocks + others)]
    scaled = [name + scaling for name in others + mixed for scaling in (":row", ":group:1", ":group:11", ":shift:1")]
    plain = [name + scaling for name in blocks + pairs + others + mixed for scaling in ("", ":none")]
    precisions = [*HOST_PRECISIONS, *plain, *scaled]
    runs = make_grid(precisions, [0.1, 0.1 + 1e-12, 1.0, 11.0], [1, 11])
    assert len({run.name for run in runs}) == len({str(run) for run in runs}) == len(runs)
    assert all("/" not in run.name and ":" not in run.name for run in runs)
