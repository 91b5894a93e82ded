"""The eleven contracts as tests: one class for all, parametrised over rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_stable.testing import contracts, strategy_checks
from lightning_stable.testing._host import hastened
from lightning_stable.testing.contracts import FAILURES, MOMENTS, PRECISIONS
from lightning_stable.testing.modules import MODULES, prepared_by
from lightning_stable.testing.process import quiet_host, restored
from lightning_stable.testing.rows import Row, preparation
from lightning_stable.testing.terms import EVERY_KIND, check_names, terms, terms_of
from lightning_stable.testing.workers import Pair

__all__ = ["ContractTests", "suite_of"]

_IN_ONE_PROCESS = tuple(kind for kind in EVERY_KIND if kind != "strategy")
# No strategy runs a pass of its own: the last call of a step is the first.
_OF_STRATEGIES = tuple(where for where in FAILURES if "last call" not in where)

# What the host says of any fit that is as small as these.
_NOTES_OF_THE_HOST = (
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers.*",
    "ignore:.*The number of training batches .* is smaller than the logging interval.*",
    "ignore:.*Checkpoint directory .* exists and is not empty.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
    "ignore:.*your dataloader is not resumable.*",
    "ignore:.*torch.distributed.*deprecated.*:FutureWarning",
)


def _hold(check: str, row: Row, tmp_path: Path, workers: Pair, **arguments: Any) -> None:
    """Hold a plugin to a contract, a strategy in two processes."""
    if row.kind == "strategy":
        strategy_checks.on_both_ranks(workers, check, row, tmp_path, **arguments)
    else:
        getattr(contracts, check)(row, tmp_path=tmp_path, **arguments)


class ContractTests:
    """The contracts; a subclass, as :func:`suite_of` makes it, says over which rows.

    Attributes:
        rows: What is under contract.
        companions: What else those are put into one Trainer with.
    """

    rows: ClassVar[tuple[Row, ...]] = ()
    companions: ClassVar[tuple[Row, ...]] = ()
    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [pytest.mark.filterwarnings(*_NOTES_OF_THE_HOST)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test its rows."""
        found = terms_of(metafunc.function)
        if found is not None:
            found.parametrize(metafunc, self.rows, self.companions)

    @pytest.fixture(autouse=True)
    def _undisturbed(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        """Begin in an empty directory and leave the process as it was; modules are prepared for the test's rows."""
        monkeypatch.chdir(tmp_path)
        callspec = getattr(request.node, "callspec", None)
        rows = [value for value in callspec.params.values() if isinstance(value, Row)] if callspec else []
        with restored(), quiet_host(), hastened(), prepared_by(preparation(*rows)):
            yield

    @terms("resume", argument="moment", cases=tuple(MOMENTS))
    def test_01_resume(self, row: Row, moment: str, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_resume`."""
        _hold("check_resume", row, tmp_path, workers, moment=moment)

    # The host's command line calls names that jsonargparse is about to drop.
    @pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
    @terms("yaml")
    def test_02_yaml(self, row: Row, tmp_path: Path) -> None:
        """See :func:`.check_yaml`."""
        contracts.check_yaml(row, tmp_path)

    # An identity may be a setting at which a method never comes to act, which it says.
    @pytest.mark.filterwarnings("ignore:.* will add nothing")
    @terms("inert")
    def test_03_inert(self, row: Row, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_inert`."""
        _hold("check_inert", row, tmp_path, workers)

    @terms("inert", kinds=("strategy",), label="one process")
    def test_03_inert_in_one_process(self, row: Row, tmp_path: Path) -> None:
        """See :func:`.check_alone`."""
        strategy_checks.check_alone(row, tmp_path)

    @terms("two processes")
    def test_04_two_processes(self, row: Row, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_two_processes` and, of strategies, :func:`.check_two_ranks`."""
        if row.kind == "strategy":
            strategy_checks.on_both_ranks(workers, "check_two_ranks", row, tmp_path)
        else:
            contracts.check_two_processes(row, workers)

    @terms("oracle", argument="how", cases=tuple(PRECISIONS))
    def test_05_oracle(self, row: Row, how: str, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_oracle`."""
        _hold("check_oracle", row, tmp_path, workers, how=how)

    @terms("exception", kinds=_IN_ONE_PROCESS, argument="where", cases=FAILURES)
    def test_06_exception(self, row: Row, where: str, tmp_path: Path) -> None:
        """See :func:`.check_exception`."""
        contracts.check_exception(row, where, tmp_path)

    @terms("exception", kinds=("strategy",), argument="where", cases=_OF_STRATEGIES)
    def test_06_exception_of_strategies(self, row: Row, where: str, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_exception`."""
        _hold("check_exception", row, tmp_path, workers, where=where)

    @terms("exception", label="test")
    def test_06_exception_in_a_test(self, row: Row, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_failing_test`."""
        _hold("check_failing_test", row, tmp_path, workers)

    @terms("reuse")
    def test_07_reuse(self, row: Row, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_reuse`."""
        _hold("check_reuse", row, tmp_path, workers)

    @terms("any module", argument="kind", cases=tuple(MODULES))
    def test_08_any_module(self, row: Row, kind: str, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_any_module`."""
        _hold("check_any_module", row, tmp_path, workers, kind=kind)

    @terms("safe load")
    def test_09_safe_load(self, row: Row, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_safe_load`."""
        _hold("check_safe_load", row, tmp_path, workers)

    @terms("company", kinds=("callback",), partners=("callback",))
    def test_10_company(self, row: Row, other: Row, tmp_path: Path) -> None:
        """See :func:`.check_company`."""
        contracts.check_company(row, other, tmp_path)

    @terms("company", kinds=("precision",), partners=("callback",))
    def test_10_company_of_precision_plugins(self, row: Row, other: Row, tmp_path: Path) -> None:
        """See :func:`.check_company`."""
        contracts.check_company(row, other, tmp_path)

    # One order: adapters are there before the first hook of training.
    @terms("company", kinds=("peft",), partners=("callback", "precision", "peft"))
    def test_10_company_of_adapters(self, row: Row, other: Row, tmp_path: Path) -> None:
        """See :func:`.check_company`."""
        contracts.check_company(row, other, tmp_path)

    @terms("company", kinds=("strategy",), partners=("callback", "precision", "peft"))
    def test_10_company_of_strategies(self, row: Row, other: Row, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_company`."""
        strategy_checks.on_both_ranks(workers, "check_company", row, tmp_path, other=other)

    @terms("company", kinds=("strategy",), label="shared average")
    def test_10_company_shares_the_average(self, row: Row, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_shared_average`."""
        strategy_checks.on_both_ranks(workers, "check_shared_average", row, tmp_path)

    @terms("precision", argument="precision", cases=("bf16-mixed", "bf16-true"))
    def test_10_company_of_precisions(self, row: Row, precision: str, tmp_path: Path, workers: Pair) -> None:
        """See :func:`.check_precision_company`."""
        _hold("check_precision_company", row, tmp_path, workers, precision=precision)

    @terms("card")
    def test_11_card(self, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """See :func:`.check_card`."""
        contracts.check_card(row, tmp_path, monkeypatch)


def suite_of(rows: Sequence[Row], companions: Sequence[Row] = ()) -> type[ContractTests]:
    """Return the test class of some rows.

    Args:
        rows: What is under contract; each says by ``find`` how another process has it.
        companions: What else those are put into one Trainer with.

    Raises:
        ValueError: If a row names a contract or a kind of module that there is not.
    """
    for row in rows:
        check_names(row, MODULES)
    members: dict[str, Any] = {"rows": tuple(rows), "companions": tuple(companions), "__doc__": ContractTests.__doc__}
    for name, function in vars(ContractTests).items():
        found = terms_of(function)
        if found is not None and not found.choose(rows, companions):
            members[name] = None  # rather than a test that is skipped
    return type("TestContracts", (ContractTests,), members)
