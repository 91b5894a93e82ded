"""``list``, ``show``, ``--help`` and ``--version``: what they print, their exit codes, and that they stay light."""

import re
import subprocess
import sys

import pytest
from added_plugins import site  # noqa: F401  a fixture

import lightning_stable
from lightning_stable.cli import locate
from lightning_stable.cli.locate import GUIDES, list_scripts, list_templates, read_card
from lightning_stable.cli.main import COMMANDS, main
from lightning_stable.registry import METHODS


def test_list_is_one_plain_line_for_each_thing_off_a_terminal(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for method in METHODS:
        (line,) = [line for line in lines if line.split()[:2] == ["method", method.name]]
        assert method.class_name in line
        assert method.summary in line
    for kind in ("recipe", "addon"):
        for template in list_templates(kind):
            (line,) = [line for line in lines if line.split()[:2] == [kind, template.name]]
            assert line.endswith(template.summary)
    assert "guide   task_stream             Task streams" in lines
    assert "script  several_machines.slurm  Starts a recipe on several machines by SLURM" in lines
    others = [line for line in lines if line.split()[0] in ("guide", "script")]
    assert len(others) == len(GUIDES) + len(list_scripts())
    assert len(lines) == len(METHODS) + len(list_templates("recipe")) + len(list_templates("addon")) + len(others)
    assert max(map(len, lines)) <= 155


def test_list_has_every_name_that_show_takes(capsys):
    assert main(["list"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    for kind, name in rows:
        assert main(["show", f"{kind}:{name}" if kind in ("recipe", "addon", "guide") else name]) == 0
    shown = {*GUIDES, *(method.name for method in METHODS), *(path.name for path in list_scripts())}
    shown |= {template.name for kind in ("recipe", "addon") for template in list_templates(kind)}
    assert {name for _, name in rows} == shown


def test_list_shows_tables_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "Methods" in out
    assert "quickstart" in out
    assert "wsd_s" in out


@pytest.mark.parametrize(
    ("width", "classes", "papers"), [(50, False, False), (80, True, False), (130, True, True), (200, True, True)]
)
def test_the_tables_fit_a_terminal_and_cut_no_name(capsys, monkeypatch, width, classes, papers):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["list"]) == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out
    table = lines[: next(index for index, line in enumerate(lines) if line.startswith("Recipes"))]
    for method in METHODS:
        (line,) = [line for line in table if line.startswith(f"  {method.name} ")]
        assert (method.class_name in re.split(" {2,}", line)) is classes
    assert ("2404.06395" in out) is papers


@pytest.fixture
def added(site):  # noqa: F811
    """A distribution with a method, its card and its addons."""
    folder = site.add("far_plugin", addons=("farther",))
    (folder / "cards").mkdir()
    (folder / "cards" / "far_plugin.md").write_text("# FarPlugin\n")
    (folder / "templates" / "addons").mkdir(parents=True)
    for name in ("far_plugin", "farther", "of_no_method"):
        (folder / "templates" / "addons" / f"{name}.yaml").write_text(f"# The addon {name}.\ntrainer: {{}}\n")
    return folder


def test_list_marks_what_comes_from_elsewhere(added, capsys, monkeypatch):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.split()[:2] == ["method", "far_plugin"]]
    assert "FarPlugin" in line
    assert line.endswith("A method of somebody else, for tests (from far-plugin 1.2)")
    assert [line for line in lines if "(from " in line] == [line]
    assert [line.split()[1] for line in lines if line.startswith("addon  far")] == [
        "far_plugin",
        "farther",
    ]
    assert not [line for line in lines if "of_no_method" in line]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["list"]) == 0
    assert "Methods from far-plugin 1.2" in capsys.readouterr().out


def test_a_summary_of_others_is_printed_as_it_is(site, capsys, monkeypatch):  # noqa: F811
    row = "Method('far_plugin', 'callback', 'far_plugin.plugin.FarPlugin', '[/]', 'like [/b] and :smile: \\\\')"
    site.add("far_plugin", rows=f"from lightning_stable.registry import Method\nMETHODS = {row}")
    monkeypatch.setenv("COLUMNS", "200")
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        assert main(["list"]) == 0
        assert "like [/b] and :smile: \\" in capsys.readouterr().out


def test_show_and_addons_find_what_comes_from_elsewhere(added, capsys):
    assert main(["show", "far_plugin"]) == 0
    assert capsys.readouterr().out == "# FarPlugin\n"
    for name in ("addon:far_plugin", "farther"):
        assert main(["show", name]) == 0
        assert capsys.readouterr().out.startswith("# The addon far")
    assert locate.resolve_config("addon:farther") == (str(added / "templates/addons/farther.yaml"), True)
    assert main(["show", "far_plugin2"]) == 2
    assert "'far_plugin'" in capsys.readouterr().err
    (added / "cards" / "far_plugin.md").unlink()
    assert main(["show", "far_plugin"]) == 2
    assert "has no card" in capsys.readouterr().err


def test_every_method_but_a_metric_has_an_addon_and_every_addon_a_method():
    known = {method.name for method in METHODS if method.kind != "metric"}
    known |= {addon for method in METHODS for addon in method.addons}
    assert {template.name for template in list_templates("addon")} == known


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_show_prints_the_card_of_a_method(method, capsys):
    assert main(["show", method.name]) == 0
    assert capsys.readouterr().out.rstrip("\n") == read_card(method.name).rstrip("\n")


def test_show_prints_a_guide(capsys, monkeypatch, tmp_path):
    assert main(["show", "task_stream"]) == 0
    assert capsys.readouterr().out.startswith("# Task streams\n")
    assert main(["show", "task_strem"]) == 2
    assert "'task_stream'" in capsys.readouterr().err
    assert main(["show", "guide:task_strem"]) == 2
    assert "no guide 'task_strem'. Did you mean 'task_stream'?" in capsys.readouterr().err
    monkeypatch.setattr(locate, "_PACKAGE", tmp_path / "package")
    assert main(["show", "task_stream"]) == 2
    assert "The guide 'task_stream' is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "heading", "others"),
    [
        ("continual", "# ContinualMetrics", ["guide:continual"]),
        ("guide:continual", "# Continual learning", []),
        ("stability_gap", "# StabilityGap", ["recipe:stability_gap", "addon:stability_gap"]),
        ("pretrain", "# Pretrain", []),
    ],
)
def test_what_else_has_the_name_of_a_method_is_told_beside_its_card(name, heading, others, capsys):
    assert main(["show", name]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{heading}\n")
    named = ", ".join(f"lightning-stable show {other}" for other in others)
    assert err == (f"Also of this name: {named}\n" if others else "")


def test_guides_lead_to_no_page_that_show_has_not():
    # What is on the website only: what is said of it is a result, a table, the API.
    elsewhere = {"api", "architecture", "benchmarks", "capabilities"}
    for guide in GUIDES:
        pages = set(re.findall(r"\]\((\w+)\.md", locate.read_guide(guide)))
        assert pages <= {*GUIDES, *elsewhere}, guide


def test_show_renders_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["show", "quickstart"]) == 0
    assert main(["show", "wsd"]) == 0
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("quickstart", "recipe"), ("wsd_s", "addon"), ("addon:ema", "addon")])
def test_show_prints_a_template(name, kind, capsys):
    assert main(["show", name]) == 0
    (template,) = [t for t in list_templates(kind) if t.name == name.rpartition(":")[2]]
    assert capsys.readouterr().out == template.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", list_scripts(), ids=lambda path: path.name)
def test_show_prints_a_script(script, capsys):
    assert main(["show", script.name]) == 0
    assert capsys.readouterr().out == script.read_text(encoding="utf-8")


def test_the_recipe_for_several_machines_says_how_to_start_it(capsys):
    assert main(["show", "co2_multi_node"]) == 0
    out = capsys.readouterr().out
    scripts = [script.name for script in list_scripts()]
    assert scripts == ["several_machines.sh", "several_machines.slurm"]
    for script in scripts:
        assert f"#   lightning-stable show {script} > {script}\n" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["lst"], ["'lst'", "'list'"]),
        (["show", "wsdd"], ["'wsdd'", "'wsd'"]),
        (["show", "several_machines.slrm"], ["script", "'several_machines.slurm'"]),
        (["show", "addon:emaa"], ["addon 'emaa'", "'ema'"]),
        (["show", "nosuch"], ["'nosuch'", "'lightning-stable list'"]),
        (["show", "nothing"], ["script 'nothing'. 'lightning-stable list'"]),
        (["show", "guide:lowbits"], ["guide 'lowbits'", "'low_bits'"]),
        (["show", "EMA"], ["'EMA'", "'ema'", "'lightning-stable list'"]),
        (["show", "addon:nosuch"], ["addon 'nosuch'", "'lightning-stable list'"]),
        (["run", "nosuch"], ["recipe 'nosuch'", "'lightning-stable list'"]),
        (["show"], ["NAME", "show --help"]),
        (["show", "wsd", "more"], ["more"]),
        (["list", "--long"], ["--long"]),
        (["run"], ["quickstart", "lm_pretrain"]),
        (["run", "--trainer.max_steps", "3"], ["name of a recipe comes first", "'--trainer.max_steps'"]),
        (["run", "quikstart"], ["'quikstart'", "'quickstart'"]),
        (["run", "ema"], ["addon", "--config addon:ema"]),
        (["--versoin"], ["--help"]),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, parts, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    if arguments[:1] == ["show"] or arguments[-1:] == ["nosuch"]:
        assert len(err) < 250, "no list of all the names"


def test_a_file_given_to_run_is_sent_to_fit(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("trainer: {}")
    assert main(["run", str(file)]) == 2
    assert f"fit --config {file}" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in out or f"\n    {command}\n" in out
    for command in ("run", "list", "show", "plot", "report", "export-adapter", "new", "doctor"):
        assert main([command, "--help"]) == 0
        assert f"usage: lightning-stable {command}" in capsys.readouterr().out
    assert main(["run", "quickstart", "--help"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-stable {lightning_stable.__version__}\n"
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_commands_are_frozen():
    assert list(COMMANDS) == [
        *("run", "sweep", "list", "show", "plot", "report", "export-adapter", "new", "doctor"),
        *("fit", "validate", "test", "predict"),
    ]


def test_light_commands_import_no_torch():
    code = (
        "import sys; from lightning_stable.cli.main import main\n"
        "light = (['list'], ['show', 'wsd_s'], ['--help'], ['run', '--help'], ['plot', '--help'], ['--version'],\n"
        "    ['export-adapter', '--help'], ['report', '--help'], ['new', '--help'], ['doctor', '--help'])\n"
        "codes = [main(arguments) for arguments in light]\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'omegaconf', 'matplotlib', 'cookiecutter'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
