"""Every contract over every row of METHODS."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract import contracts, strategy_checks
from contract.contracts import FAILURES, MOMENTS, PRECISIONS, Row
from contract.harness import MODULES
from contract.modules import prepared_by
from contract.rows import preparation
from contract.settings import ROWS
from contract.workers import Pair


@pytest.fixture(autouse=True)
def _prepared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let modules be prepared for the rows that a test is about."""
    rows = [value for value in request.node.callspec.params.values() if isinstance(value, Row)]
    with prepared_by(preparation(*rows)):
        yield


def over_rows(contract: str, rows: list[Row] = ROWS) -> Any:
    """Parametrise over rows; what a row says cannot hold is a strict expected failure with its reason."""
    cases = []
    for row in rows:
        reason = row.settings.expected_failures.get(contract)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        cases.append(pytest.param(row, id=row.name, marks=marks))
    return pytest.mark.parametrize("row", cases)


def check(name: str, row: Row, tmp_path: Path, workers: Pair, **arguments: Any) -> None:
    """Hold a plugin to a contract, a strategy in two processes."""
    if row.kind == "strategy":
        strategy_checks.on_both_ranks(workers, name, row, tmp_path, **arguments)
    else:
        getattr(contracts, name)(row, tmp_path=tmp_path, **arguments)


CALLBACKS = [row for row in ROWS if row.kind == "callback"]
STRATEGIES = [row for row in ROWS if row.kind == "strategy"]
PLUGINS = [row for row in ROWS if row.kind == "precision"]
PEFT = [row for row in ROWS if row.kind == "peft"]
# What a Trainer takes for the other rows is the first one's class.
WHOLE_PEFT = [row for row in PEFT if row.class_path.endswith(f".{row.class_name}")]
# Both orders: hooks run in the order in which callbacks are given. A metric is not in the Trainer with them.
PAIRS = list(itertools.permutations(CALLBACKS, 2))
# One order: adapters are there before the first hook of training.
PEFT_PAIRS = [
    *itertools.product(WHOLE_PEFT, [*CALLBACKS, *PLUGINS]),
    *itertools.combinations(WHOLE_PEFT, 2),
    *((row, other) for row in PEFT if row not in WHOLE_PEFT for other in CALLBACKS if other.name in ("ema", "sam")),
]


@pytest.mark.parametrize("moment", MOMENTS)
@over_rows("resume")
def test_01_resume(row: Row, moment: str, tmp_path: Path, workers: Pair) -> None:
    check("check_resume", row, tmp_path, workers, moment=moment)


@over_rows("yaml")
def test_02_yaml(row: Row, tmp_path: Path) -> None:
    contracts.check_yaml(row, tmp_path)


# An identity may be a setting at which a method never comes to act, which it says.
@pytest.mark.filterwarnings("ignore:.* will add nothing")
@over_rows("inert")
def test_03_inert(row: Row, tmp_path: Path, workers: Pair) -> None:
    check("check_inert", row, tmp_path, workers)


@over_rows("inert", STRATEGIES)
def test_03_inert_in_one_process(row: Row, tmp_path: Path) -> None:
    strategy_checks.check_alone(row, tmp_path)


@over_rows("two processes")
def test_04_two_processes(row: Row, tmp_path: Path, workers: Pair) -> None:
    if row.kind == "strategy":
        strategy_checks.on_both_ranks(workers, "check_two_ranks", row, tmp_path)
    else:
        contracts.check_two_processes(row, workers, f"contract.settings:SETTINGS[{row.name}].make")


@pytest.mark.parametrize("how", PRECISIONS)
@over_rows("oracle")
def test_05_oracle(row: Row, how: str, tmp_path: Path, workers: Pair) -> None:
    check("check_oracle", row, tmp_path, workers, how=how)


@pytest.mark.parametrize("where", FAILURES)
@over_rows("exception", [row for row in ROWS if row.kind != "strategy"])
def test_06_exception(row: Row, where: str, tmp_path: Path) -> None:
    contracts.check_exception(row, where, tmp_path)


# No strategy runs a pass of its own: the last call of a step is the first.
@pytest.mark.parametrize("where", [where for where in FAILURES if "last call" not in where])
@over_rows("exception", STRATEGIES)
def test_06_exception_of_strategies(row: Row, where: str, tmp_path: Path, workers: Pair) -> None:
    check("check_exception", row, tmp_path, workers, where=where)


@over_rows("exception")
def test_06_exception_in_a_test(row: Row, tmp_path: Path, workers: Pair) -> None:
    check("check_failing_test", row, tmp_path, workers)


@over_rows("reuse")
def test_07_reuse(row: Row, tmp_path: Path, workers: Pair) -> None:
    check("check_reuse", row, tmp_path, workers)


@pytest.mark.parametrize("kind", MODULES)
@over_rows("any module")
def test_08_any_module(row: Row, kind: str, tmp_path: Path, workers: Pair) -> None:
    check("check_any_module", row, tmp_path, workers, kind=kind)


@over_rows("safe load")
def test_09_safe_load(row: Row, tmp_path: Path, workers: Pair) -> None:
    check("check_safe_load", row, tmp_path, workers)


@pytest.mark.parametrize(("row", "other"), PAIRS, ids=[f"{row.name}-{other.name}" for row, other in PAIRS])
def test_10_company(row: Row, other: Row, tmp_path: Path) -> None:
    contracts.check_company(row, other, tmp_path)


@pytest.mark.parametrize("other", CALLBACKS, ids=lambda row: row.name)
@pytest.mark.parametrize("row", PLUGINS, ids=lambda row: row.name)
def test_10_company_of_precision_plugins(row: Row, other: Row, tmp_path: Path) -> None:
    contracts.check_company(row, other, tmp_path)


@pytest.mark.parametrize(("row", "other"), PEFT_PAIRS, ids=[f"{row.name}-{other.name}" for row, other in PEFT_PAIRS])
def test_10_company_of_adapters(row: Row, other: Row, tmp_path: Path) -> None:
    contracts.check_company(row, other, tmp_path)


@pytest.mark.parametrize("other", [*CALLBACKS, *PLUGINS, *WHOLE_PEFT], ids=lambda row: row.name)
@pytest.mark.parametrize("row", STRATEGIES, ids=lambda row: row.name)
def test_10_company_of_strategies(row: Row, other: Row, tmp_path: Path, workers: Pair) -> None:
    name = f"contract.settings:BY_NAME[{other.name}]"
    strategy_checks.on_both_ranks(workers, "check_company", row, tmp_path, other=name)


@pytest.mark.parametrize("row", STRATEGIES, ids=lambda row: row.name)
def test_10_company_shares_the_average(row: Row, tmp_path: Path, workers: Pair) -> None:
    strategy_checks.on_both_ranks(workers, "check_shared_average", row, tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@over_rows("precision")
def test_10_company_of_precisions(row: Row, precision: str, tmp_path: Path, workers: Pair) -> None:
    check("check_precision_company", row, tmp_path, workers, precision=precision)


@over_rows("card")
def test_11_card(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contracts.check_card(row, tmp_path, monkeypatch)
