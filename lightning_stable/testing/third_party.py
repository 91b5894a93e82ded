"""The contract suite of another distribution: its methods found in the registry, each with its settings."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from lightning_stable._extensions import extensions
from lightning_stable.registry import Method, addons_of, nearest
from lightning_stable.testing.company import COMPANY, company_row
from lightning_stable.testing.rows import Row, Settings, resolve
from lightning_stable.testing.suite import ContractTests, suite_of

__all__ = ["contract_suite"]

# The rows of the suites that were made in this process, by what made them and by name.
_MADE: dict[tuple[str, str], Row] = {}


def contract_suite(
    settings: Mapping[str, Settings] | str,
    *,
    methods: Sequence[Method] | None = None,
    folder: Path | None = None,
    company: Sequence[str] = tuple(COMPANY),
) -> type[ContractTests]:
    """Return a test class that holds a distribution's methods to the eleven contracts.

    Assign it, in a test module, to a name that pytest collects: ``TestContracts = contract_suite({...})``. The module
    is imported by further processes, too.

    Args:
        settings: A row of settings for each method that the distribution adds, by the method's name; or where to find
            them, as ``"package.module:NAME"``.
        methods: The methods; by default those of the installed distributions that add one of these names, by the
            entry-point group ``lightning_stable.methods``.
        folder: Where their ``cards/NAME.md`` and ``templates/addons/NAME.yaml`` lie; by default where the entry point
            says, or in the package of the first of ``methods``.
        company: Which of our plugins (keys of :data:`.COMPANY`) they are put into one Trainer with.

    Raises:
        ValueError: If a name is not that of a method, or a method of the distribution has no settings.
    """
    caller = sys._getframe(1).f_globals
    source, file = str(caller["__name__"]), str(caller.get("__file__", ""))
    if isinstance(settings, str):
        source = settings
    of: Mapping[str, Settings] = resolve(settings) if isinstance(settings, str) else settings
    found = _registered(of) if methods is None else _given(methods, folder)
    _check_complete(of, [method for method, _ in found])
    rows = [_row(method, where, of[method.name], (source, file)) for method, where in found]
    for row in rows:
        _MADE[source, row.name] = row
    for name in company:
        if name not in COMPANY:
            raise ValueError(f"company names {name!r}. {nearest(name, list(COMPANY))}")
    return suite_of(rows, [company_row(name) for name in company])


def _registered(settings: Mapping[str, Settings]) -> list[tuple[Method, Path]]:
    """Return the methods of each distribution that adds one of these names, and where their cards and addons lie."""
    added = extensions()
    ours = {each.distribution for each in added if any(method.name in settings for method in each.methods)}
    return [(method, each.folder) for each in added if each.distribution in ours for method in each.methods]


def _given(methods: Sequence[Method], folder: Path | None) -> list[tuple[Method, Path]]:
    if folder is None and methods:
        spec = find_spec(methods[0].class_path.partition(".")[0])
        folder = Path(spec.origin).parent if spec is not None and spec.origin else Path.cwd()
    return [(method, folder or Path.cwd()) for method in methods]


def _check_complete(settings: Mapping[str, Settings], methods: Sequence[Method]) -> None:
    names = [method.name for method in methods]
    for name in settings:
        if name not in names:
            known = names or [method.name for each in extensions() for method in each.methods]
            raise ValueError(
                f"No installed distribution adds a method {name!r} by the entry-point group "
                f"'lightning_stable.methods'. {nearest(name, known) if known else 'There is none at all.'} "
                "Install yours (pip install -e .), or give its rows as methods=."
            )
    missing = [name for name in names if name not in settings]
    if missing:
        raise ValueError(f"Methods without settings for the contracts: {', '.join(missing)}. Give each a row.")


def _row(method: Method, folder: Path, settings: Settings, source: tuple[str, str]) -> Row:
    return Row(
        name=method.name,
        class_path=method.class_path,
        settings=settings,
        kind=method.kind,
        addons=tuple(folder / "templates" / "addons" / f"{addon}.yaml" for addon in addons_of(method)),
        card=folder / "cards" / f"{method.name}.md",
        find=partial(_find, *source, method.name),
    )


def _find(source: str, file: str, name: str) -> Row:
    """Return a row in another process, which makes the suite, too: by its settings, its test module, or that's file."""
    if (source, name) not in _MADE:
        if ":" in source:
            contract_suite(source)
        else:
            _import(source, file)
    if (source, name) not in _MADE:
        raise ValueError(f"{source} ({file}) makes no contract suite with a row {name!r} when it is imported.")
    return _MADE[source, name]


def _import(module: str, file: str) -> None:
    """Import a test module by its name, or else, as where pytest puts no folder on the path, from its file."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        found = None
    if found is not None and Path(str(found.__file__)) == Path(file):
        return
    spec = spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{module} cannot be imported from {file!r}.")
    sys.modules[module] = made = module_from_spec(spec)
    spec.loader.exec_module(made)
