"""The proof that the contracts bite on a strategy, in two processes, and on a callback beside one with local steps."""

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from contract import broken_strategies as broken
from contract.broken import row

from lightning_stable.testing import strategy_checks
from lightning_stable.testing.contracts import MOMENTS
from lightning_stable.testing.rows import resolve
from lightning_stable.testing.workers import Pair, of_all_ranks, of_rank_zero, processes

BITES = AssertionError
CALLBACKS = {
    kind.__name__: dataclasses.replace(
        row(kind), find=partial(resolve, f"contract.test_the_contracts_of_strategies:CALLBACKS[{kind.__name__}]")
    )
    for kind in (broken.PullsToItsAverage, broken.PullsToRankZeros, broken.PullsToItsOwn)
}


def check(workers: Pair, tmp_path: Path, strategy: type, name: str, **arguments: Any) -> None:
    """Hold one of the strategies to a contract."""
    strategy_checks.on_both_ranks(workers, name, broken.ROWS[strategy.__name__], tmp_path, **arguments)


def test_the_contracts_pass_an_honest_strategy(workers: Pair, tmp_path: Path) -> None:
    honest = broken.HonestRounds
    for moment in MOMENTS:
        check(workers, tmp_path, honest, "check_resume", moment=moment)
    check(workers, tmp_path, honest, "check_inert")
    check(workers, tmp_path, honest, "check_two_ranks")
    for how in ("accumulation and clipping", "bf16-mixed"):
        check(workers, tmp_path, honest, "check_oracle", how=how)
    for where in ("train, last call", "batch end", "validate"):
        check(workers, tmp_path, honest, "check_exception", where=where)
    check(workers, tmp_path, honest, "check_failing_test")
    check(workers, tmp_path, honest, "check_reuse")
    for kind in ("boring", "manual", "two optimizers", "iterable"):
        check(workers, tmp_path, honest, "check_any_module", kind=kind)
    check(workers, tmp_path, honest, "check_safe_load")
    check(workers, tmp_path, honest, "check_shared_average")
    strategy_checks.check_alone(broken.ROWS["HonestRounds"], tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (broken.SavesWhatRankZeroHas, "check_resume", "resumed run against uninterrupted run"),
        (broken.KeepsItsOwnMoments, "check_resume", "resumed run against uninterrupted run"),
        (broken.ForgetsItsRounds, "check_resume", "resumed run against uninterrupted run"),
        (broken.DoesSomethingAlone, "check_inert", "at its identity against nothing"),
        (broken.ValidatesItsOwnWeights, "check_two_ranks", "of a rank against those of rank 0 in validation"),
        (broken.TrainsOnFromTheMean, "check_two_ranks", "what the ranks go on from"),
        (broken.ExchangesLate, "check_two_ranks", "what the ranks go on from after step 3"),
        (broken.SavesNoState, "check_safe_load", "its state was not saved"),
        (broken.LeavesCallbacksApart, "check_shared_average", "EMA against that of the mean weights"),
    ],
)
def test_the_contracts_bite_on_a_strategy(kind: type, name: str, message: str, workers: Pair, tmp_path: Path) -> None:
    with pytest.raises(BITES, match=message):
        check(workers, tmp_path, kind, name)


def test_09_safe_load_bites_on_a_strategy(workers: Pair, tmp_path: Path) -> None:
    with pytest.raises(BITES, match=r"weights_only|Weights only"):
        check(workers, tmp_path, broken.SavesAPath, "check_safe_load")


def test_03_inert_bites_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(BITES, match="at its identity against nothing"):
        strategy_checks.check_alone(broken.ROWS["DoesSomethingAlone"], tmp_path)


@pytest.mark.parametrize("callback", ["PullsToItsAverage", "PullsToRankZeros"])
def test_10_company_of_a_strategy_passes_a_callback_whose_state_is_shared(
    callback: str, workers: Pair, tmp_path: Path
) -> None:
    other = CALLBACKS[callback]
    check(workers, tmp_path, broken.HonestRounds, "check_company", other=other)
    with pytest.raises(BITES, match="resumed run against uninterrupted run"):
        check(workers, tmp_path, broken.LeavesCallbacksApart, "check_company", other=other)


def test_10_company_of_a_strategy_bites_on_a_callback(workers: Pair, tmp_path: Path) -> None:
    other = CALLBACKS["PullsToItsOwn"]
    with pytest.raises(BITES, match="resumed run against uninterrupted run"):
        check(workers, tmp_path, broken.HonestRounds, "check_company", other=other)


# ---------------------------------------------------------------------------------------------------- the pair


def whoami() -> tuple[int, list[int], int, int]:
    rank = int(os.environ["RANK"])
    return processes(), of_all_ranks(rank), of_rank_zero(rank), os.getpid()


def fail_on(ranks: list[int], kind: str) -> None:
    if int(os.environ["RANK"]) in ranks:
        raise {"assertion": AssertionError, "error": RuntimeError}[kind]("deliberate")
    if len(ranks) == 1:
        dist.barrier()


def test_the_pair_says_who_is_who(workers: Pair, tmp_path: Path) -> None:
    assert processes() == 1
    assert of_all_ranks("here") == ["here"]
    assert of_rank_zero("here") == "here"
    check(workers, tmp_path, broken.HonestRounds, "check_safe_load")
    first, second = workers.run("contract.test_the_contracts_of_strategies:whoami")
    assert first[:3] == second[:3] == (2, [0, 1], 0)


def test_a_pair_goes_on_after_an_assertion_on_both_ranks_and_is_replaced_after_other_failures(
    workers: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other rank waits for the one that failed until it is stopped.
    monkeypatch.setattr("lightning_stable.testing.workers._SECONDS_AFTER_A_FAILURE", 2)
    name = "contract.test_the_contracts_of_strategies:fail_on"
    workers.run("lightning_stable.testing.strategy_checks:begin")

    def pids() -> list[int]:
        return [answer[-1] for answer in workers.run("contract.test_the_contracts_of_strategies:whoami")]

    before = pids()
    with pytest.raises(BITES, match=r"(?s)rank 0 failed.*rank 1 failed"):
        workers.run(name, ranks=[0, 1], kind="assertion")
    assert pids() == before
    with pytest.raises(BITES, match="rank 1 failed"):
        workers.run(name, ranks=[1], kind="error")
    workers.run("lightning_stable.testing.strategy_checks:begin")
    assert not set(pids()) & set(before)
