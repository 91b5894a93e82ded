"""``lightning-stable list`` and ``lightning-stable show``: what there is, without importing torch."""

import sys
from collections.abc import Iterable

from lightning_stable._extensions import extensions
from lightning_stable.cli.locate import (
    FOLDERS,
    GUIDES,
    CommandError,
    Template,
    find_template,
    list_scripts,
    list_templates,
    read_card,
    read_guide,
)
from lightning_stable.registry import METHODS, Method, methods, nearest

__all__ = ["print_list", "show"]


def print_list() -> None:
    """Print methods, recipes and addons: tables on a terminal, else one plain line each.

    A method that another distribution adds is marked with that distribution.
    """
    recipes, addons = list_templates("recipe"), list_templates("addon")
    if sys.stdout.isatty():
        _print_tables(recipes, addons)
        return
    rows: list[tuple[str, str, str, str, str]] = [
        *(("method", m.name, m.kind, m.class_name, _describe(m)) for m in METHODS),
        *(
            ("method", m.name, m.kind, m.class_name, f"{_describe(m)} (from {extension.distribution})")
            for extension in extensions()
            for m in extension.methods
        ),
        *((t.kind, t.name, "config", f"{t.kind}:{t.name}", t.summary) for t in (*recipes, *addons)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True))
        sys.stdout.write("  ".join((*cells, row[4])) + "\n")


def show(name: str) -> None:
    """Print the card of a method, a guide, the YAML of a recipe or an addon, or a script that starts a recipe.

    Args:
        name: A method, guide, recipe, addon or script; ``addon:NAME`` and ``recipe:NAME`` name a template where a
            method has the same name.

    Raises:
        CommandError: If there is nothing of that name; the message suggests the near ones.
    """
    for kind in FOLDERS:
        if name.startswith(f"{kind}:"):
            _print_text(find_template(kind, name.removeprefix(f"{kind}:")).path.read_text(encoding="utf-8"), "yaml")
            return
    known_methods = {method.name for method in methods()}
    if name in known_methods:
        _print_text(read_card(name), "markdown")
        return
    if name in GUIDES:
        _print_text(read_guide(name), "markdown")
        return
    files = {t.name: (t.path, "yaml") for kind in reversed(FOLDERS) for t in list_templates(kind)}
    files |= {path.name: (path, "bash") for path in list_scripts()}
    if name not in files:
        known = [*files, *GUIDES, *known_methods]
        raise CommandError(
            f"There is no method, guide, recipe, addon or script {name!r}. {nearest(name, sorted(set(known)))}"
        )
    path, language = files[name]
    _print_text(path.read_text(encoding="utf-8"), language)


def _describe(method: Method) -> str:
    """Return the summary of a method and its papers, which only our own methods have to have."""
    return f"{method.summary} [{method.paper}]" if method.paper else method.summary


def _print_text(text: str, language: str) -> None:
    """Print a file: rendered on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.syntax import Syntax

    if language == "markdown":
        Console().print(Markdown(text))
    else:
        Console().print(Syntax(text, language, background_color="default", word_wrap=True))


def _print_tables(recipes: list[Template], addons: list[Template]) -> None:
    """Print the tables of a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    groups: list[tuple[str, Iterable[Method]]] = [("Methods", METHODS)]
    groups += [(f"Methods from {extension.distribution}", extension.methods) for extension in extensions()]
    for title, group in groups:
        table = Table(
            "name", "class", "what it does", "paper (arXiv)", title=title, title_justify="left", box=box.SIMPLE
        )
        for method in group:
            table.add_row(f"[bold]{method.name}[/]", method.class_name, method.summary, method.paper)
        console.print(table)
    for title, templates in (
        ("Recipes: lightning-stable run NAME", recipes),
        ("Addons: lightning-stable fit --config mine.yaml --config addon:NAME", addons),
    ):
        table = Table("name", "what it is", title=title, title_justify="left", box=box.SIMPLE)
        for template in templates:
            table.add_row(f"[bold]{template.name}[/]", template.summary)
        console.print(table)
    console.print("A card or a config in full: [bold]lightning-stable show NAME[/]")
