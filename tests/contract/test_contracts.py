"""Every contract over every row of METHODS."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from contract import contracts
from contract.contracts import FAILURES, MOMENTS, PRECISIONS, Row
from contract.harness import MODULES
from contract.settings import ROWS
from contract.workers import Pair


def over_rows(contract: str, rows: list[Row] = ROWS) -> Any:
    """Parametrise over rows; what a row says cannot hold is a strict expected failure with its reason."""
    cases = []
    for row in rows:
        reason = row.settings.expected_failures.get(contract)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        cases.append(pytest.param(row, id=row.name, marks=marks))
    return pytest.mark.parametrize("row", cases)


# Both orders: hooks run in the order in which callbacks are given. A metric is not in the Trainer with them.
PAIRS = list(itertools.permutations([row for row in ROWS if row.kind != "metric"], 2))


@pytest.mark.parametrize("moment", MOMENTS)
@over_rows("resume")
def test_01_resume(row: Row, moment: str, tmp_path: Path) -> None:
    contracts.check_resume(row, tmp_path, moment=moment)


@over_rows("yaml")
def test_02_yaml(row: Row, tmp_path: Path) -> None:
    contracts.check_yaml(row, tmp_path)


# An identity may be a setting at which a method never comes to act, which it says.
@pytest.mark.filterwarnings("ignore:.* will add nothing")
@over_rows("inert")
def test_03_inert(row: Row, tmp_path: Path) -> None:
    contracts.check_inert(row, tmp_path)


@over_rows("two processes")
def test_04_two_processes(row: Row, workers: Pair) -> None:
    contracts.check_two_processes(row, workers, f"contract.settings:SETTINGS[{row.name}].make")


@pytest.mark.parametrize("how", PRECISIONS)
@over_rows("oracle")
def test_05_oracle(row: Row, how: str, tmp_path: Path) -> None:
    contracts.check_oracle(row, how, tmp_path)


@pytest.mark.parametrize("where", FAILURES)
@over_rows("exception")
def test_06_exception(row: Row, where: str, tmp_path: Path) -> None:
    contracts.check_exception(row, where, tmp_path)


@over_rows("exception")
def test_06_exception_in_a_test(row: Row, tmp_path: Path) -> None:
    contracts.check_failing_test(row, tmp_path)


@over_rows("reuse")
def test_07_reuse(row: Row, tmp_path: Path) -> None:
    contracts.check_reuse(row, tmp_path)


@pytest.mark.parametrize("kind", MODULES)
@over_rows("any module")
def test_08_any_module(row: Row, kind: str, tmp_path: Path) -> None:
    contracts.check_any_module(row, kind, tmp_path)


@over_rows("safe load")
def test_09_safe_load(row: Row, tmp_path: Path) -> None:
    contracts.check_safe_load(row, tmp_path)


@pytest.mark.parametrize(("row", "other"), PAIRS, ids=[f"{row.name}-{other.name}" for row, other in PAIRS])
def test_10_company(row: Row, other: Row, tmp_path: Path) -> None:
    contracts.check_company(row, other, tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@over_rows("precision")
def test_10_company_of_precisions(row: Row, precision: str, tmp_path: Path) -> None:
    contracts.check_precision_company(row, precision, tmp_path)


@over_rows("card")
def test_11_card(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contracts.check_card(row, tmp_path, monkeypatch)
