"""What `pytest --capabilities` writes of the reports that it sees."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contract.broken import Honest, row

from lightning_stable.testing import plugin
from lightning_stable.testing.capabilities import PROPERTY, Capabilities, subject_of
from lightning_stable.testing.suite import suite_of


def report(subject: dict[str, Any], outcome: str = "passed", when: str = "call", **more: Any) -> Any:
    states = {state: outcome == state for state in ("passed", "failed", "skipped")}
    # As pytest-xdist brings it: lists for tuples.
    properties = json.loads(json.dumps([("other", 1), (PROPERTY, subject)]))
    return SimpleNamespace(user_properties=properties, when=when, longrepr=None, **states, **more)


def about(contract: str, *pairs: tuple[str, str], refusal: str = "") -> dict[str, Any]:
    return {"contract": contract, "refusal": refusal, "about": [(name, "callback", case) for name, case in pairs]}


def written(capabilities: Capabilities) -> dict[str, Any]:
    capabilities.pytest_sessionfinish()
    return json.loads(capabilities.path.read_text())["methods"]


def test_each_kind_of_finding(tmp_path: Path) -> None:
    capabilities = Capabilities(tmp_path / "found.json")
    resume = about("resume", ("ema", "batch end"))
    for seen in (
        report(resume, when="setup"),
        report(resume),
        report(resume, when="teardown"),
        report(about("any module", ("ema", "manual"), refusal="does not work")),
        report(about("inert", ("ema", "all")), "skipped", wasxfail="reason: it has none"),
        report(about("card", ("ema", "all")), "failed"),
        report(about("oracle", ("ema", "fp32")), "failed", when="setup"),
        report(about("yaml", ("ema", "all")), "skipped", when="setup"),
        SimpleNamespace(user_properties=[], when="call", passed=True),
    ):
        capabilities.pytest_runtest_logreport(seen)
    contracts = written(capabilities)["ema"]["contracts"]
    assert {name: contract["finding"] for name, contract in contracts.items()} == {
        "resume": "passed",
        "any module": "refused",
        "inert": "expected failure",
        "card": "failed",
        "oracle": "failed",
        "yaml": "skipped",
    }
    assert contracts["any module"]["reasons"] == {"manual": "does not work"}
    assert contracts["inert"]["reasons"] == {"all": "it has none"}
    assert list(contracts) == ["resume", "yaml", "inert", "oracle", "any module", "card"]


def test_a_pair_counts_for_both_and_its_worse_order_counts(tmp_path: Path) -> None:
    capabilities = Capabilities(tmp_path / "found.json")
    for pair, outcome in (((("ema", "sam"), ("sam", "ema")), "failed"), ((("sam", "ema"), ("ema", "sam")), "passed")):
        capabilities.pytest_runtest_logreport(report(about("company", *pair), outcome))
    refused = about("company", ("ema", "wsd"), refusal="not together")
    capabilities.pytest_runtest_logreport(report(refused))
    methods = written(capabilities)
    assert methods["sam"]["contracts"]["company"]["cases"] == {"ema": "failed"}
    company = methods["ema"]["contracts"]["company"]
    assert company["cases"] == {"sam": "failed", "wsd": "refused"}
    assert company["counts"] == {"failed": 1, "refused": 1}
    assert company["finding"] == "failed"


def test_methods_are_in_the_order_of_the_registry_and_those_of_others_behind(tmp_path: Path) -> None:
    capabilities = Capabilities(tmp_path / "found.json")
    for name in ("aaa", "sam", "ema"):
        capabilities.pytest_runtest_logreport(report(about("card", (name, "all"))))
    assert list(written(capabilities)) == ["ema", "sam", "aaa"]


def test_where_nothing_ran_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text("of the last time")
    lines: list[str] = []
    capabilities = Capabilities(path)
    capabilities.pytest_sessionfinish()
    capabilities.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert path.read_text() == "of the last time"
    assert "was not written" in lines[0]


def item(name: str, **params: Any) -> Any:
    suite = suite_of([row(Honest, refused_modules={"manual": "not by hand"}, conflicts={"ema": "not with it"})])
    return SimpleNamespace(function=getattr(suite, name), cls=suite, callspec=SimpleNamespace(params=params))


def test_a_test_says_what_it_is_about() -> None:
    honest, other = row(Honest, refused_modules={"manual": "not by hand"}), row(Honest, conflicts={"honest": "never"})
    said = subject_of(item("test_08_any_module", row=honest, kind="manual"))
    assert said == {
        "contract": "any module",
        "refusal": "not by hand",
        "about": [("honest", "callback", "manual")],
    }
    assert subject_of(item("test_08_any_module", row=honest, kind="dict"))["refusal"] == ""
    company = subject_of(item("test_07_reuse", row=honest))
    assert company == {"contract": "reuse", "refusal": "", "about": [("honest", "callback", "all")]}
    stranger = other.__class__(**{**vars(other), "name": "stranger"})
    pair = subject_of(item("test_02_yaml", row=honest, other=stranger))
    assert (pair["refusal"], pair["about"]) == ("never", [("honest", "callback", "stranger")])


def test_a_test_of_another_kind_says_nothing() -> None:
    assert subject_of(SimpleNamespace(function=test_a_test_of_another_kind_says_nothing)) is None


def test_a_file_in_no_folder_is_refused_at_once(tmp_path: Path) -> None:
    config = SimpleNamespace(
        getini=lambda name: "",
        getoption=lambda name: "nowhere/found.json",
        invocation_params=SimpleNamespace(dir=tmp_path),
    )
    with pytest.raises(
        pytest.UsageError, match=r"--capabilities nowhere/found.json: the folder .*nowhere does not exist"
    ):
        plugin.pytest_configure(config)
