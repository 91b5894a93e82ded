"""The table of methods, and the package's promise to import nothing heavy until it is asked for."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from added_plugins import site  # noqa: F401  a fixture

import lightning_stable
from lightning_stable._extensions import PAGES, extensions, host_classes, load_classes
from lightning_stable.cli.locate import GUIDES, list_scripts, list_templates
from lightning_stable.registry import METHODS, Method, addons_of, find_method, load_class, methods, nearest

ROOMS = {
    "callback": "callbacks",
    "strategy": "strategies",
    "precision": "precision",
    "peft": "peft",
    "metric": "metrics",
}
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
ARXIV = re.compile(r"\d{4}\.\d{4,5}")

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def python(code: str, cwd: Path) -> str:
    """Run ``code`` in a fresh interpreter, away from the checkout, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ----------------------------------------------------------------------------- the rows


def test_there_are_rows_and_no_two_share_a_name_or_a_class():
    assert METHODS
    assert len({method.name for method in METHODS}) == len(METHODS)
    assert len({method.class_name for method in METHODS}) == len(METHODS)
    assert len({method.class_path for method in METHODS}) == len(METHODS)
    classes = [name for method in METHODS for name in (method.class_name, *method.relatives)]
    assert len(set(classes)) == len(classes)


def test_no_two_rows_share_an_addon():
    own = [method.name for method in METHODS if method.kind != "metric"]
    addons = [*own, *(addon for method in METHODS for addon in method.addons)]
    assert len(set(addons)) == len(addons)


@each_method
def test_a_row_is_well_formed(method: Method):
    assert NAME.fullmatch(method.name)
    assert method.kind in ROOMS
    package, room, file, class_name = method.class_path.split(".")
    assert package == "lightning_stable"
    assert room == ROOMS[method.kind]
    assert file == method.name  # one method, one name
    assert class_name == method.class_name
    assert class_name.isidentifier()
    assert class_name[0].isupper()
    assert all(NAME.fullmatch(addon) for addon in method.addons)
    assert isinstance(method.addons, tuple)
    assert isinstance(method.relatives, tuple)


@each_method
def test_a_row_cites_arxiv_and_sums_up_in_a_line(method: Method):
    assert all(ARXIV.fullmatch(paper) for paper in method.paper.split(", "))
    assert method.summary == method.summary.strip()
    assert "\n" not in method.summary
    assert 20 <= len(method.summary) <= 100
    assert not method.summary.endswith(".")
    assert method.summary[0].isupper()


@each_method
def test_a_row_loads_its_class_and_the_package_exports_it(method: Method):
    cls = load_class(method)
    assert isinstance(cls, type)
    assert cls.__name__ == method.class_name
    assert f"{cls.__module__}.{cls.__qualname__}" == method.class_path
    assert getattr(lightning_stable, method.class_name) is cls
    assert cls.__doc__


@each_method
def test_a_row_names_every_further_public_class_of_its_module(method: Method):
    module = sys.modules[load_class(method).__module__]
    classes = {name for name in module.__all__ if isinstance(getattr(module, name), type)}
    assert classes == {method.class_name, *method.relatives}
    room = importlib.import_module(module.__name__.rpartition(".")[0])
    for name in method.relatives:
        assert getattr(module, name).__module__ == module.__name__
        assert getattr(module, name).__doc__
        assert getattr(room, name) is getattr(module, name)


# ----------------------------------------------------------------------------- finding


@each_method
def test_a_method_is_found_by_its_name(method: Method):
    assert find_method(method.name) is method


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("wds", "wsd"), ("emma", "ema"), ("balanced-ema", "balanced_ema"), ("ballanced_ema", "balanced_ema")],
)
def test_a_near_miss_is_answered_with_the_near_name(wrong: str, near: str):
    with pytest.raises(ValueError, match=re.escape(repr(wrong))) as caught:
        find_method(wrong)
    assert f"Did you mean {near!r}" in str(caught.value) or f"or {near!r}" in str(caught.value)


def test_a_far_miss_is_answered_with_all_names():
    with pytest.raises(ValueError, match="'zzzzzz'") as caught:
        find_method("zzzzzz")
    for method in METHODS:
        assert method.name in str(caught.value)
    assert "Did you mean" not in str(caught.value)


def test_a_case_slip_does_not_pass_silently():
    with pytest.raises(ValueError, match="'EMA'"):
        find_method("EMA")


def test_nearest_offers_at_most_three():
    assert nearest("ab", ["abc", "abd", "abe", "abf"]).count("'") == 6
    assert nearest("abc", ["abd"]) == "Did you mean 'abd'?"
    assert nearest("q", ["b", "a"]) == "Known names: a, b."


# ----------------------------------------------------------------------------- methods of other distributions


def test_without_other_distributions_there_are_ours():
    assert methods() == METHODS
    assert extensions() == ()
    assert addons_of(find_method("wsd")) == ("wsd", "wsd_s")
    assert addons_of(find_method("continual")) == ()


def test_an_installed_distribution_adds_its_methods(site, capsys):  # noqa: F811
    folder = site.add("far_plugin", addons=("farther",))
    site.add("another_plugin")
    assert [method.name for method in methods()[len(METHODS) :]] == ["another_plugin", "far_plugin"]
    (_, far) = extensions()
    assert (far.distribution, far.folder) == ("far-plugin 1.2", folder)
    assert addons_of(find_method("far_plugin")) == ("far_plugin", "farther")
    assert find_method("far_plugin").class_name == "FarPlugin"
    with pytest.raises(ValueError, match="Did you mean 'far_plugin'"):
        find_method("far_plugins")
    assert capsys.readouterr().err == ""


def test_a_single_row_and_a_list_of_rows_will_do(site):  # noqa: F811
    row = "Method('{0}', 'metric', '{0}.x.{1}', '', 'Of somebody else')"
    head = "from lightning_stable.registry import Method\nMETHODS = "
    site.add("one_row", rows=head + row.format("one_row", "One"))
    site.add("two_rows", rows=f"{head}[{row.format('two_rows', 'Two')}, {row.format('third', 'Three')}]")
    assert [method.name for method in methods()[len(METHODS) :]] == ["one_row", "two_rows", "third"]


ROW = "from lightning_stable.registry import Method\nMETHODS = Method({})"
LOUD_ROW = ROW.format("'loud_plugin', 'callback', 'loud_plugin.plugin.LoudPlugin', '', 'Of somebody else'")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ("import not_installed_anywhere", ["broken_plugin.methods:METHODS", "not_installed_anywhere"]),
        ("1 / 0", ["ZeroDivisionError"]),
        ("OTHER = ()", ["METHODS"]),
        ("import sys; sys.exit(3)", ["SystemExit: 3"]),
        ("raise ValueError('two\\nlines')", ["two lines"]),
        ("class Odd:\n    __repr__ = None\nMETHODS = Odd()", ["TypeError"]),
        (ROW.format("5, 'callback', 'a.B', '', 'x'"), ["name of 5", "one line of text"]),
        (ROW.format("'mine', ['callback'], 'a.B', '', 'x'"), ["kind of 'mine'", "['callback']"]),
        (ROW.format("'mine', 'callback', None, '', 'x'"), ["class_path of 'mine'", "None"]),
        (ROW.format("'mine', 'callback', 'a.B', None, 'x'"), ["paper of 'mine'", "None"]),
        (ROW.format("'mine', 'callback', 'a.B', '', None"), ["summary of 'mine'", "None"]),
        (ROW.format("'mine', 'callback', 'a.B', '', 'two\\nlines'"), ["summary of 'mine'", "one line"]),
        (ROW.format("'mine', 'callback', 'a.B', '', 'x', None"), ["addons of 'mine'", "a tuple of names"]),
        (ROW.format("'mine', 'callback', 'a.B', '', 'x', 'more'"), ["addons of 'mine'", "'more'"]),
        (ROW.format("'mine', 'callback', 'a.B', '', 'x', ('../a',)"), ["addons of 'mine'", "../a"]),
        (ROW.format("'mine', 'callback', 'a.B', '', 'x', (), ['C']"), ["relatives of 'mine'", "['C']"]),
        ("METHODS = 'ema'", ["'ema'", "registry.Method"]),
        (ROW.format("'Upper', 'callback', 'a.B', '', 'x'"), ["'Upper'", "lower case"]),
        (ROW.format("'mine', 'scheduler', 'a.B', '', 'x'"), ["'mine'", "'scheduler'", "callback, strategy"]),
        (ROW.format("'mine', 'callback', 'B', '', 'x'"), ["'mine'", "'B'", "package.module.Class"]),
        (ROW.format("'ema', 'callback', 'a.B', '', 'x'"), ["name 'ema'", "lightning-stable"]),
        (ROW.format("'wsd_s', 'callback', 'a.B', '', 'x'"), ["name 'wsd_s'", "lightning-stable"]),
        (ROW.format("'mine', 'callback', 'a.B', '', 'x', ('pissa',)"), ["name 'pissa'", "lightning-stable"]),
        (ROW.format("'mine', 'callback', 'a.EMA', '', 'x'"), ["class name 'EMA'", "lightning-stable"]),
        (ROW.format("'mine', 'callback', 'a.EarlyStopping', '', 'x'"), ["name 'EarlyStopping'", "class of lightning,"]),
        (ROW.format("'mine', 'metric', 'a.B', '', 'x', (), ('XLAStrategy',)"), ["name 'XLAStrategy'", "of lightning,"]),
        (ROW.format("'doctor', 'callback', 'a.B', '', 'x'"), ["name 'doctor'", "guide or recipe"]),
        (ROW.format("'mine', 'callback', 'a.B', '', 'x', ('quickstart',)"), ["name 'quickstart'", "guide or recipe"]),
        (ROW.format("'mine', 'metric', 'a.B', '', 'x', (), ('Forgetting',)"), ["class name 'Forgetting'"]),
    ],
)
def test_what_is_wrong_with_one_is_told_once_and_stops_nothing(rows, parts, site, capsys):  # noqa: F811
    site.add("broken_plugin", rows=rows)
    site.add("good_plugin")
    for _ in range(2):
        assert [method.name for method in methods()[len(METHODS) :]] == ["good_plugin"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-stable: warning: ")
    for part in ("broken-plugin 1.2", *parts):
        assert part in line


def test_no_method_can_be_called_as_a_guide_a_recipe_or_a_script():
    recipes = {recipe.name for recipe in list_templates("recipe")}
    assert {*GUIDES, *recipes} == PAGES, "a new guide or recipe goes into PAGES in lightning_stable/_extensions.py"
    assert not any(NAME.fullmatch(path.name) for path in list_scripts())


def test_without_the_host_its_names_are_free(monkeypatch):
    host_classes.cache_clear()
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert host_classes() == frozenset()
    host_classes.cache_clear()


def test_what_a_distribution_prints_at_import_stays_out_of_the_output(site, capsys):  # noqa: F811
    folder = site.add("loud_plugin", rows="print('loud rows')\n" + LOUD_ROW)
    (folder / "plugin.py").write_text("print('loud class')\nclass LoudPlugin: pass")
    load_classes()
    assert find_method("loud_plugin")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "loud rows\nloud class\n"


def test_a_class_whose_module_exits_is_told_and_left_out(site, capsys):  # noqa: F811
    folder = site.add("quitting_plugin")
    (folder / "plugin.py").write_text("import sys; sys.exit(3)")
    load_classes()
    assert "quitting_plugin.plugin.QuittingPlugin of quitting-plugin 1.2 cannot be" in capsys.readouterr().err


def test_two_distributions_with_one_name_are_both_named(site, capsys):  # noqa: F811
    site.add("first_plugin", name="same")
    site.add("second_plugin", name="same")
    assert methods()[len(METHODS) :] == (find_method("same"),)
    assert find_method("same").class_path.startswith("first_plugin.")
    err = capsys.readouterr().err
    assert "second-plugin 1.2" in err
    assert "first-plugin 1.2" in err


def test_a_class_that_cannot_be_imported_is_told_once_and_leaves_the_rest(site, capsys):  # noqa: F811
    site.add("broken_plugin")
    good = site.add("good_plugin")
    (good / "plugin.py").write_text("class GoodPlugin: pass")
    for _ in range(2):
        load_classes()
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken_plugin.plugin.BrokenPlugin of broken-plugin 1.2" in line
    assert sys.modules["good_plugin.plugin"].GoodPlugin


# ----------------------------------------------------------------------------- imports


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d*)?(\.dev\d+)?", lightning_stable.__version__)


def test_an_unknown_attribute_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="Nonsense"):
        lightning_stable.Nonsense  # noqa: B018
    assert not hasattr(lightning_stable, "nonsense")


def test_completion_shows_the_lazy_names():
    assert {method.class_name for method in METHODS} <= set(dir(lightning_stable))


@pytest.mark.parametrize("room", ["callbacks", "metrics"])
def test_completion_shows_the_lazy_names_of_a_room(room: str, tmp_path: Path):
    code = f"""
import sys
import lightning_stable.{room} as room
names = dir(room)
print(sorted(set(room.__all__) - set(names)), len(names) - len(set(names)), 'torch' in sys.modules)
"""
    assert python(code, tmp_path) == "[] 0 False"


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path):
    code = """
import sys
import lightning_stable, lightning_stable.registry
lightning_stable.registry.methods()
dir(lightning_stable)
lightning_stable.__version__
heavy = ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "numpy", "transformers", "peft",
         "sklearn", "jsonargparse", "omegaconf", "rich", "matplotlib")
print(*[name for name in heavy if name in sys.modules])
"""
    assert python(code, tmp_path) == ""


def test_a_callback_brings_lightning_and_nothing_heavier(tmp_path: Path):
    code = """
import sys
import lightning.pytorch
before = set(sys.modules)
import lightning_stable
assert lightning_stable.EMA.__name__ == "EMA"
from lightning_stable.callbacks import EMA
assert EMA is lightning_stable.EMA
heavy = ("pytorch_lightning", "transformers", "peft", "sklearn", "matplotlib", "torchao", "jsonargparse", "omegaconf")
print(*[name for name in heavy if name in sys.modules and name not in before])
"""
    assert python(code, tmp_path) == ""


def test_a_metric_brings_torchmetrics_and_nothing_heavier(tmp_path: Path):
    code = """
import sys
import torchmetrics
before = set(sys.modules)
from lightning_stable.metrics import ContinualMetrics
heavy = ("lightning", "pytorch_lightning", "transformers", "peft", "sklearn", "matplotlib", "torchao", "jsonargparse")
print(*[name for name in heavy if name in sys.modules and name not in before])
"""
    assert python(code, tmp_path) == ""


def test_functional_is_torch_only(tmp_path: Path):
    code = """
import sys
import lightning_stable.functional.wsd, lightning_stable.functional.ema, lightning_stable.functional.balanced_ema
print(*[name for name in ("lightning", "torchmetrics", "transformers", "peft", "sklearn") if name in sys.modules])
"""
    assert python(code, tmp_path) == ""
