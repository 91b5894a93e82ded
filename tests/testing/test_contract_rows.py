"""Which rows a suite has: those of one distribution, all of them, with the names that there are; and its pairs."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
from contract.broken import Honest, row

from lightning_stable._extensions import Extension
from lightning_stable.registry import Method, methods
from lightning_stable.testing import Settings, contract_suite, third_party
from lightning_stable.testing.company import COMPANY, company_row
from lightning_stable.testing.rows import Row, found_by, resolve
from lightning_stable.testing.suite import ContractTests, suite_of
from lightning_stable.testing.terms import pairs_of

ONE = Method("halving", "callback", "demo_plugin.halving.Halving", "", "Scales the gradients of each step")
OTHER = Method("forgetful", "callback", "demo_plugin.halving.Forgetful", "", "Scales them less from step to step")
KEPT = Settings(make=Honest, oracle=lambda run, plugin: None, identities=())


@pytest.fixture(autouse=True)
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one distribution have added two methods by two entry points."""
    added = (Extension("demo 0.1", tmp_path, (ONE,)), Extension("demo 0.1", tmp_path, (OTHER,)))
    monkeypatch.setattr(third_party, "extensions", lambda: added)


def test_rows_come_from_the_registry_with_their_files(tmp_path: Path) -> None:
    suite = contract_suite({"halving": KEPT, "forgetful": KEPT}, company=("ema",))
    assert [each.name for each in suite.rows] == ["halving", "forgetful"]
    assert [each.name for each in suite.companions] == ["ema"]
    (first, _) = suite.rows
    assert (first.class_path, first.kind) == ("demo_plugin.halving.Halving", "callback")
    assert first.card == tmp_path / "cards" / "halving.md"
    assert first.addons == (tmp_path / "templates" / "addons" / "halving.yaml",)
    assert found_by(first)() is first


def test_a_method_of_the_distribution_without_settings_is_told() -> None:
    with pytest.raises(ValueError, match=r"Methods without settings for the contracts: forgetful\. Give each a row"):
        contract_suite({"halving": KEPT})


def test_settings_without_a_method_are_told() -> None:
    with pytest.raises(ValueError, match=r"adds a method 'halvin' .*Did you mean 'halving'\? .*pip install -e"):
        contract_suite({"halvin": KEPT})


def test_one_of_our_own_methods_is_not_of_another_distribution() -> None:
    with pytest.raises(ValueError, match="No installed distribution adds a method 'ema'"):
        contract_suite({"halving": KEPT, "forgetful": KEPT, "ema": KEPT})


def test_methods_may_be_given(tmp_path: Path) -> None:
    (ema,) = [method for method in methods() if method.name == "ema"]
    suite = contract_suite({"ema": KEPT}, methods=[ema])
    assert suite.rows[0].card == Path(third_party.__file__).parents[1] / "cards" / "ema.md"
    suite = contract_suite({"ema": KEPT}, methods=[ema], folder=tmp_path)
    assert suite.rows[0].card == tmp_path / "cards" / "ema.md"


def test_unknown_names_are_told() -> None:
    both = {"forgetful": KEPT}
    with pytest.raises(ValueError, match=r"company names 'em'\. Did you mean 'ema'"):
        contract_suite({**both, "halving": KEPT}, company=("em",))
    failing = dataclasses.replace(KEPT, expected_failures={"resum": "it draws lots"})
    with pytest.raises(ValueError, match=r"expected_failures of 'halving' names 'resum'\. Did you mean 'resume'"):
        contract_suite({**both, "halving": failing})
    refusing = dataclasses.replace(KEPT, refused_modules={"manuall": "does not work"})
    with pytest.raises(ValueError, match=r"refused_modules of 'halving' names 'manuall'\. Did you mean 'manual'"):
        contract_suite({**both, "halving": refusing})
    # What cannot be beside another one is a conflict with it.
    failing = dataclasses.replace(KEPT, expected_failures={"company": "it likes none"})
    with pytest.raises(ValueError, match="names 'company'"):
        contract_suite({**both, "halving": failing})


def test_a_row_that_no_other_process_finds_is_told() -> None:
    with pytest.raises(ValueError, match="'honest' does not say how another process finds it"):
        found_by(dataclasses.replace(row(Honest), find=None))


# ---------------------------------------------------------------------------------------------------- other processes


def test_another_process_imports_the_test_module_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "suites_of_demo.py"
    file.write_text(
        "from contract.broken import Honest\n"
        "from lightning_stable.testing import Settings, contract_suite\n"
        "kept = Settings(make=Honest, oracle=print, identities=())\n"
        "TestContracts = contract_suite({'halving': kept, 'forgetful': kept})\n"
    )
    found = third_party._find("suites_of_demo", str(file), "forgetful")
    assert (found.name, found.settings.oracle) == ("forgetful", print)
    with pytest.raises(ValueError, match="makes no contract suite with a row 'third'"):
        third_party._find("suites_of_demo", str(file), "third")
    monkeypatch.syspath_prepend(tmp_path)
    by_name = third_party._find("suites_of_demo", str(file), "halving")
    assert by_name.name == "halving"


def test_settings_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings_of_demo.py").write_text(
        "from contract.broken import Honest\n"
        "from lightning_stable.testing import Settings\n"
        "SETTINGS = dict.fromkeys(['halving', 'forgetful'], Settings(make=Honest, oracle=print, identities=()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    suite = contract_suite("settings_of_demo:SETTINGS")
    third_party._MADE.clear()
    assert [found_by(each)().name for each in suite.rows] == ["halving", "forgetful"]


# ---------------------------------------------------------------------------------------------------- pairs


def of_kind(name: str, kind: str, company: tuple[str, ...] | None = None) -> Row:
    return dataclasses.replace(row(Honest, company=company), name=name, kind=kind)


def names(pairs: object) -> list[str]:
    return [f"{one.name}-{other.name}" for one, other in pairs]


def test_pairs_of_callbacks_are_in_both_orders_and_companions_are_not_beside_each_other() -> None:
    rows, companions = [of_kind("a", "callback")], [of_kind("x", "callback"), of_kind("y", "callback")]
    assert names(pairs_of(("callback",), ("callback",), rows, companions)) == ["a-x", "a-y", "x-a", "y-a"]


def test_pairs_of_other_kinds_are_in_one_order() -> None:
    rows = [of_kind("c", "callback"), of_kind("p", "peft"), of_kind("q", "peft"), of_kind("s", "precision")]
    assert names(pairs_of(("peft",), ("callback", "precision", "peft"), rows, [])) == [
        "p-c",
        "p-q",
        "p-s",
        "q-c",
        "q-s",
    ]
    assert names(pairs_of(("precision",), ("callback",), rows, [])) == ["s-c"]
    assert names(pairs_of(("precision",), ("callback",), rows[:1], rows[3:])) == ["s-c"]


def test_a_row_may_name_its_company() -> None:
    rows = [of_kind("a", "callback", company=("b",)), of_kind("b", "callback"), of_kind("c", "callback")]
    assert names(pairs_of(("callback",), ("callback",), rows, [])) == ["a-b", "b-a", "b-c", "c-b"]


def test_tests_that_have_no_row_are_not_there() -> None:
    suite = suite_of([of_kind("a", "callback")], [company_row("ema")])
    assert suite.test_10_company is ContractTests.test_10_company
    assert suite.test_10_company_of_strategies is None
    assert suite.test_06_exception_of_strategies is None
    assert suite_of([of_kind("m", "metric")]).test_10_company is None


@pytest.mark.parametrize("name", COMPANY)
def test_each_companion_can_be_made_and_found(name: str) -> None:
    companion = company_row(name)
    assert type(companion.settings.make()).__name__ == companion.class_name
    assert found_by(companion)().class_path == companion.class_path


def test_rows_resolve_by_name() -> None:
    assert partial(resolve, "contract.broken:ROWS[Honest]")().name == "honest"
