"""The pages that are made when the documentation is built: whole, and right about what they are made from."""

import json
import re
import runpy

import pytest
from doc_blocks import ROOT

from lightning_stable.registry import METHODS


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


# ----------------------------------------------------------------------------- methods and API


def test_the_index_has_a_row_and_an_entry_for_every_method(conf):
    page = conf["methods_page"]()
    for method in METHODS:
        assert f"| [{method.name}](methods/{method.name}.md) `{method.class_name}` | {method.summary} | " in page
        assert f"\nmethods/{method.name}\n" in page


def test_the_api_has_every_public_module(conf):
    page = conf["api_page"]()
    for path in (ROOT / "lightning_stable").glob("[!_]*/[!_]*.py"):
        if path.parent.name not in ("cli", "testing"):
            assert f".. automodule:: lightning_stable.{path.parent.name}.{path.stem}\n" in page
    for module in ("testing", "testing.plugin", "registry"):
        assert f".. automodule:: lightning_stable.{module}\n" in page


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.stem == "index" or f"\n{path.stem}\n" in index, f"{path.name} is in no toctree of index.md"


# ----------------------------------------------------------------------------- benchmarks


def result(day, **further):
    return {
        "benchmark": "demo",
        "date": f"2026-01-0{day}",
        "hardware": {"cpu": "some CPU", "cores": 2, "versions": {"torch": "2.6"}},
        "report": ["| a | b |", "|---|---|", f"| {day} | x |"],
    } | further


def test_the_benchmarks_page_does_without_results(conf, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert "no results yet" in conf["benchmarks_page"](folder)


def test_the_benchmarks_page_has_the_newest_result_of_each_machine(conf, tmp_path):
    for day in (1, 2):
        targets = {"fast_enough": True, "small_enough": False}
        (tmp_path / f"demo-2026-01-0{day}-some.json").write_text(json.dumps(result(day, targets=targets)))
    page = conf["benchmarks_page"](tmp_path) + conf["reports_page"](tmp_path)
    row = "| Others | [demo](#benchmark-demo) | 2026-01-02 | some CPU, 2 cores | 1 of 2 met, **missed**: small enough |"
    assert row in page
    assert "(benchmark-demo)=\n\n#### demo, 2026-01-02\n\nsome CPU, 2 cores; torch 2.6.\n" in page
    assert "| 2 | x |" in page
    assert "2026-01-01" not in page


def test_aims_are_counted_in_a_report_without_a_list_of_them(conf, tmp_path):
    report = [
        "A: 0.9 (met), B: 0.3 (ahead of it: missed); C at least 2: met.",
        "",
        "X is faster: no (1 of 3).",
        "Y: yes",
    ]
    (tmp_path / "demo-2026-01-01-some.json").write_text(json.dumps(result(1, report=report)))
    said = "2 of 3 met, **1 missed**; claims of papers: 1 no, 1 yes"
    assert f"| some CPU, 2 cores | {said} |" in conf["benchmarks_page"](tmp_path)


def test_pictures_beside_a_result_are_shown_and_copied(conf, tmp_path):
    (tmp_path / "demo-2026-01-01-some.json").write_text(json.dumps(result(1)))
    (tmp_path / "demo-2026-01-01-some.png").write_bytes(b"a picture")
    (tmp_path / "demo-2026-01-01-some-text.png").write_bytes(b"another")
    page = conf["reports_page"](tmp_path)
    copies = tmp_path / "copies"
    copies.mkdir()
    conf["copy_pictures"](copies, tmp_path)
    for name in ("demo-2026-01-01-some.png", "demo-2026-01-01-some-text.png"):
        assert f"(generated/{name})" in page
        assert (copies / name).exists()


def test_every_benchmark_has_a_topic(conf):
    topics = conf["benchmarks_page"].__globals__["TOPICS"]
    known = {name for names in topics.values() for name in names}
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert scripts <= known, f"docs/_gallery.py has no topic for {sorted(scripts - known)}"


def test_generated_pages_are_written_once(conf, tmp_path):
    conf["write_generated"](tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {"api.md", "benchmarks.md", "capabilities.md", "methods.md"} <= times.keys()
    conf["write_generated"](tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


# ----------------------------------------------------------------------------- capabilities


CASES = {
    "two processes": {"all": "passed"},
    "oracle": {"accumulation": "passed", "clipping": "passed", "accumulation and clipping": "expected failure"},
    "precision": {"bf16-mixed": "passed", "bf16-true": "failed"},
    "any module": {"boring": "passed", "dictionary": "passed", "manual": "refused"},
    "company": {"sam": "passed", "balanced_ema": "refused"},
}


def test_the_capabilities_are_those_that_were_written(conf, tmp_path):
    file = tmp_path / "capabilities.json"
    contracts = {contract: {"finding": "passed", "cases": cases} for contract, cases in CASES.items()}
    written = {"date": "2026-01-01", "versions": {"torch": "2.6"}, "methods": {"ema": {"contracts": contracts}}}
    file.write_text(json.dumps(written))
    page = conf["capabilities_page"](file)
    assert "Run on 2026-01-01 with torch 2.6." in page
    # Two processes, bf16-mixed, bf16-true, accumulation, clipping, resume, modules, company
    found = "yes | yes | **fails** | no | no | – | 2 work, 1 refused | 1 work, 1 refused"
    assert f"\n| [ema](methods/ema.md#works-with) | {found} |\n" in page
    assert f"\n| [wsd](methods/wsd.md#works-with) | {' | '.join('–' * 8)} |\n" in page, "nothing is known of it"


def test_the_capabilities_page_does_without_a_file(conf, tmp_path):
    page = conf["capabilities_page"](tmp_path / "missing.json")
    assert "written nothing yet" in page
    for method in METHODS:
        assert f"| [{method.name}](methods/{method.name}.md#works-with) | – |" in page


def test_every_method_says_what_it_costs(conf):
    costs = dict(re.findall(r"^\| \[(\w+)\]\(\S+#cost\) \| (.*) \|$", conf["capabilities_page"](), re.MULTILINE))
    assert costs.keys() == {method.name for method in METHODS}
    assert costs["ema"] == "One extra copy of the weights that train, and one fused pass over them for each average"
    assert all(len(cost) > 20 for cost in costs.values()), costs


def test_the_committed_capabilities_are_of_the_methods_that_there_are():
    path = ROOT / "docs" / "capabilities.json"
    cure = "Run the whole suite with --capabilities docs/capabilities.json."
    assert path.is_file(), f"{path} is missing. {cure}"
    written = json.loads(path.read_text(encoding="utf-8"))["methods"]
    names = {method.name for method in METHODS}
    assert written.keys() == names, (
        f"missing {sorted(names - written.keys())}, gone {sorted(written.keys() - names)}. {cure}"
    )
