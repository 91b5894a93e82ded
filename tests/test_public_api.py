"""The public interface is what ``public_api.txt`` says: every public name of every public module, with its signature.

After a change that is meant, write the listing again and commit it with the change:

    python tests/test_public_api.py

It is read from the sources, without importing them, so that it is the same on every version of Python. Left out are
modules and names that begin with an underscore, the Python of the command (its promise is its commands and options),
and hooks that override the host's, whose signatures are the host's.
"""

import ast
import difflib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTING = Path(__file__).with_name("public_api.txt")
PACKAGE = "lightning_stable"
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class Sources:
    """The modules of a package, by their dotted names, parsed when they are asked for."""

    def __init__(self, root: Path, package: str) -> None:
        self.package = package
        self.files = {}
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if "templates" not in parts:
                self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        # Asked for again and again.
        self.tree = functools.cache(lambda module: ast.parse(self.files[module].read_text(encoding="utf-8")))
        self.imported = functools.cache(self._imported)

    def public_modules(self) -> Iterator[str]:
        for module in self.files:
            inner = module.split(".")[1:]
            # Of the contract suite the package and its plugin are for others.
            shown = inner[:1] not in (["cli"], ["testing"]) or inner in (["testing"], ["testing", "plugin"])
            if shown and not any(part.startswith("_") for part in inner):
                yield module

    def _imported(self, module: str) -> dict[str, tuple[str, str]]:
        """Where the names come from that a module imports by name, as (module, name)."""
        found = {}
        for node in statements(self.tree(module).body):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        return found

    def definition(self, module: str, name: str) -> ast.stmt | None:
        """The last statement at the top of a module that defines a name."""
        found = None
        for node in statements(self.tree(module).body):
            targets = [node] if isinstance(node, (*_FUNCTION, ast.ClassDef)) else assigned(node)
            if any(getattr(target, "name", getattr(target, "id", None)) == name for target in targets):
                found = node
        return found

    def lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases within the package, nearest first."""
        yield module, node
        for base in node.bases:
            name = base.value.id if isinstance(base, ast.Subscript) else getattr(base, "id", "")
            where, name = self.imported(module).get(name, (module, name))
            if where in self.files and isinstance(found := self.definition(where, name), ast.ClassDef):
                yield from self.lineage(where, found)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those below an ``if``."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from statements([*node.body, *node.orelse])


def assigned(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def exported(tree: ast.Module) -> list[str]:
    """What ``__all__`` says; every module of ours that has public names has one."""
    for node in tree.body:
        if any(getattr(target, "id", "") == "__all__" for target in assigned(node)):
            return sorted(ast.literal_eval(node.value))
    return []


def decorators(node: ast.stmt) -> set[str]:
    return {ast.unparse(item).partition("(")[0].rpartition(".")[2] for item in getattr(node, "decorator_list", [])}


def signature(node: ast.FunctionDef, *, bound: bool = False) -> str:
    arguments = node.args
    if bound and "staticmethod" not in decorators(node):
        first = arguments.posonlyargs or arguments.args
        arguments = ast.arguments(
            posonlyargs=arguments.posonlyargs[1:],
            args=arguments.args if first is arguments.posonlyargs else arguments.args[1:],
            vararg=arguments.vararg,
            kwonlyargs=arguments.kwonlyargs,
            kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg,
            defaults=arguments.defaults,
        )
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    return f"({ast.unparse(arguments)}){returns}"


def members(node: ast.ClassDef) -> dict[str, str]:
    """The public members of one class, without what overrides a base."""
    found = {}
    for item in node.body:
        if isinstance(item, _FUNCTION) and not item.name.startswith("_") and "override" not in decorators(item):
            kind = decorators(item)
            if "setter" in kind:
                found[item.name] += " (can be set)"
            elif kind & {"property", "cached_property"}:
                found[item.name] = signature(item, bound=True).rpartition(" -> ")[2]
            else:
                found[item.name] = signature(item, bound=True)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            value = f" = {ast.unparse(item.value)}" if item.value is not None else ""
            if not item.target.id.startswith("_"):
                found[item.target.id] = f"{ast.unparse(item.annotation)}{value}"
        elif isinstance(item, ast.Assign):
            for target in item.targets:
                if isinstance(target, ast.Name) and not target.id.startswith("_"):
                    found[target.id] = f"= {ast.unparse(item.value)}"
    return found


def class_lines(sources: Sources, module: str, node: ast.ClassDef) -> Iterator[str]:
    lineage = list(sources.lineage(module, node))
    constructors = (item for _, cls in lineage for item in cls.body if getattr(item, "name", "") == "__init__")
    constructor = next(constructors, None)
    yield f"class {node.name}{signature(constructor, bound=True) if constructor is not None else ''}"
    found = {}
    for _, cls in reversed(lineage):
        found.update(members(cls))
    for name, text in sorted(found.items()):
        yield f"    {name}{text if text.startswith('(') else f': {text}' if not text.startswith('=') else f' {text}'}"


def name_lines(sources: Sources, module: str, name: str) -> Iterator[str]:
    node = sources.definition(module, name)
    if isinstance(node, ast.ClassDef):
        yield from class_lines(sources, module, node)
    elif isinstance(node, _FUNCTION):
        yield f"{name}{signature(node)}"
    elif isinstance(node, ast.AnnAssign):
        yield f"{name}: {ast.unparse(node.annotation)}"
    elif node is not None:
        yield f"{name} = ..."
    else:
        where, original = sources.imported(module).get(name, ("", name))
        yield f"{name} from {where}" + (f" ({original})" if original != name else "") if where else f"{name} ?"


@functools.cache
def present() -> str:
    """Return the listing of the package, once for all tests."""
    return listing(ROOT, PACKAGE)


def listing(root: Path, package: str) -> str:
    """Return the listing of a package."""
    sources = Sources(root, package)
    lines = []
    for module in sources.public_modules():
        names = exported(sources.tree(module))
        if names:
            lines += ["", f"# {module}", *(line for name in names for line in name_lines(sources, module, name))]
    return "\n".join([*lines[1:], ""])


def methods() -> str:
    """Return what configs name: methods, their classes and their addons."""
    from lightning_stable.registry import METHODS

    lines = [f"{m.name} {m.kind} {m.class_path} {' '.join(m.addons)}".rstrip() for m in METHODS]
    return "\n".join(["# methods: name, kind, class, further addons", *lines, "", ""])


# ----------------------------------------------------------------------------- the tests


def test_the_public_interface_is_the_committed_one():
    found, committed = methods() + present(), LISTING.read_text(encoding="utf-8")
    changes = difflib.unified_diff(committed.splitlines(), found.splitlines(), "committed", "found", lineterm="", n=0)
    assert found == committed, (
        "The public interface changed. Is it meant, and does docs/deprecation.md allow it? Then: python "
        "tests/test_public_api.py\n" + "\n".join(changes)
    )


def test_every_public_name_was_found():
    assert " ?" not in [line[-2:] for line in present().splitlines()]


def test_every_method_is_in_the_listing():
    from lightning_stable.registry import METHODS

    text = present()
    for method in METHODS:
        module, _, name = method.class_path.rpartition(".")
        section = text.partition(f"# {module}\n")[2].partition("\n# ")[0]
        assert f"class {name}(" in section or f"class {name}\n" in section


DEMO = """
from typing import NamedTuple
from demo._base import Base
from demo.other import helper as helped
__all__ = ["CONSTANT", "Final", "Row", "helped", "function"]
CONSTANT: int = 3
_hidden = 4
def function(a: int, /, b: str = "x", *more: float, c=None, **rest) -> list[int]:
    return []
def _private(): ...
class Row(NamedTuple):
    name: str
    size: int = 1
    @property
    def area(self) -> float:
        return 0.0
class Final(Base):
    other: int
    @override
    def on_train_start(self, trainer): ...
    @staticmethod
    def build(a): ...
    def run(self, steps: int = 5) -> None: ...
    def _inner(self): ...
"""
BASE = """
class Base:
    def __init__(self, width: int, *, depth: int = 2) -> None: ...
    def inherited(self) -> bool: ...
    def run(self) -> None: ...
"""
DEMO_LISTING = """\
# demo.api
CONSTANT: int
class Final(width: int, *, depth: int=2)
    build(a)
    inherited() -> bool
    other: int
    run(steps: int=5) -> None
class Row
    area: float
    name: str
    size: int = 1
function(a: int, /, b: str='x', *more: float, c=None, **rest) -> list[int]
helped from demo.other (helper)
"""


def test_the_listing_shows_what_a_user_can_call(tmp_path):
    (tmp_path / "demo" / "cli").mkdir(parents=True)
    files = {"api": DEMO, "_base": BASE, "other": "def helper(): ...", "cli/__init__": '__all__ = ["main"]\nmain = 1'}
    for name, text in files.items():
        (tmp_path / "demo" / f"{name}.py").write_text(text, encoding="utf-8")
    assert listing(tmp_path, "demo") == DEMO_LISTING
    changed = DEMO.replace("steps: int = 5", "steps: int = 6")
    (tmp_path / "demo" / "api.py").write_text(changed, encoding="utf-8")
    assert listing(tmp_path, "demo") == DEMO_LISTING.replace("steps: int=5", "steps: int=6")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    LISTING.write_text(methods() + present(), encoding="utf-8")
