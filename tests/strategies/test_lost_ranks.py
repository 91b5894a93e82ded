"""A process that dies under DDP of another kind: the error of the others names it, as under local updates."""

import re

import pytest
from strategies.groups import Group


@pytest.mark.parametrize("name", ["CompressedDDPStrategy", "OneBitAdamStrategy"])
def test_the_death_of_one_process_is_named_by_the_other(name):
    with Group(2) as two:
        two.start("strategies.lost_rank_jobs:train_until_one_dies", name=name, who=1, at=4)
        survivor, dead = two.collect(120.0)
    assert dead.outcome == "died"
    assert survivor.outcome == "done", survivor.value
    assert re.match(
        rf"RuntimeError: {name}: rank 1 did not come, .* Start again from the last checkpoint", survivor.value
    )


def test_an_error_of_the_users_own_is_left_as_it_is(workers):
    said = workers.run("strategies.lost_rank_jobs:train_until_all_raise", name="CompressedDDPStrategy", at=2)
    assert said == ["RuntimeError: no link is lost here"] * 2
