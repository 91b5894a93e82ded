"""``lightning-stable list`` and ``lightning-stable show``: what there is, without importing torch."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING

from lightning_stable._extensions import extensions
from lightning_stable.cli.locate import (
    FOLDERS,
    GUIDES,
    CommandError,
    find_template,
    list_guides,
    list_scripts,
    list_templates,
    read_card,
    read_guide,
    suggest,
)
from lightning_stable.registry import METHODS, Method, methods

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_list", "show"]

# Columns of a terminal below which a table leaves out the papers, and the classes too: what a method does comes first.
_FOR_PAPERS, _FOR_CLASSES = 120, 76


def print_list() -> None:
    """Print methods, recipes, addons, guides and scripts: tables on a terminal, else one plain line each.

    A method that another distribution adds is marked with that distribution.
    """
    if sys.stdout.isatty():
        _print_tables()
        return
    # A line has what it is looked for by, and no more, so that it stays short: the papers of a method are in its card.
    rows = [("method", m.name, m.class_name, m.summary) for m in METHODS]
    rows += [
        ("method", m.name, m.class_name, f"{m.summary} (from {extension.distribution})")
        for extension in extensions()
        for m in extension.methods
    ]
    _print_aligned(rows)
    _print_aligned([("recipe", t.name, t.summary) for t in list_templates("recipe")])
    _print_aligned([("addon", t.name, t.summary) for t in list_templates("addon")])
    _print_aligned([*(("guide", *guide) for guide in list_guides()), *(("script", *script) for script in _scripts())])


def show(name: str) -> None:
    """Print the card of a method, a guide, the YAML of a recipe or an addon, or a script that starts a recipe.

    Args:
        name: A method, guide, recipe, addon or script; ``addon:NAME``, ``recipe:NAME`` and ``guide:NAME`` name a
            template or a guide where a method has the same name. Then a line on stderr tells of it, so that what is
            printed stays the file.

    Raises:
        CommandError: If there is nothing of that name; the message suggests the near ones.
    """
    for kind in FOLDERS:
        if name.startswith(f"{kind}:"):
            _print_text(find_template(kind, name.removeprefix(f"{kind}:")).path.read_text(encoding="utf-8"), "yaml")
            return
    if name.startswith("guide:"):
        _print_text(read_guide(name.removeprefix("guide:")), "markdown")
        return
    known_methods = {method.name for method in methods()}
    if name in known_methods:
        _print_text(read_card(name), "markdown")
        _tell_namesakes(name)
        return
    if name in GUIDES:
        _print_text(read_guide(name), "markdown")
        return
    files = {t.name: (t.path, "yaml") for kind in reversed(FOLDERS) for t in list_templates(kind)}
    files |= {path.name: (path, "bash") for path in list_scripts()}
    if name not in files:
        known = [*files, *GUIDES, *known_methods]
        raise CommandError(
            f"There is no method, guide, recipe, addon or script {name!r}. {suggest(name, sorted(set(known)))}"
        )
    path, language = files[name]
    _print_text(path.read_text(encoding="utf-8"), language)


def _tell_namesakes(name: str) -> None:
    """Tell which guides and templates have the name of a method, whose card is what the plain name shows."""
    kinds = ["guide"] if name in GUIDES else []
    kinds += [kind for kind in FOLDERS if name in {template.name for template in list_templates(kind)}]
    if kinds:
        sys.stdout.flush()
        where = ", ".join(f"lightning-stable show {kind}:{name}" for kind in kinds)
        sys.stderr.write(f"Also of this name: {where}\n")


def _scripts() -> Iterator[tuple[str, str]]:
    """Yield the names of the scripts and the first sentence of each, below the line that names its shell."""
    for path in list_scripts():
        comment = path.read_text(encoding="utf-8").splitlines()[1]
        yield path.name, comment.lstrip("# ").partition(". ")[0].rstrip(":")


def _print_aligned(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows, all columns but the last as wide as their widest cell."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, text in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        sys.stdout.write("  ".join((*padded, text)) + "\n")


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


def _print_tables() -> None:
    """Print the tables of a terminal, within its width."""
    from rich.console import Console

    console = Console()
    # What is left out is in the cards.
    width = {"name": 0, "class": _FOR_CLASSES, "what it does": 0, "paper (arXiv)": _FOR_PAPERS}
    groups: list[tuple[str, Iterable[Method]]] = [("Methods", METHODS)]
    groups += [(f"Methods from {extension.distribution}", extension.methods) for extension in extensions()]
    for title, group in groups:
        rows = [(m.name, m.class_name, m.summary, m.paper) for m in group]
        shown = [console.width >= needed for needed in width.values()]
        _print_table(console, title, compress(width, shown), [tuple(compress(row, shown)) for row in rows])
    for title, pairs in (
        ("Recipes: lightning-stable run NAME", [(t.name, t.summary) for t in list_templates("recipe")]),
        (
            "Addons: lightning-stable fit --config mine.yaml --config addon:NAME",
            [(t.name, t.summary) for t in list_templates("addon")],
        ),
        ("Guides and scripts: lightning-stable show NAME", [*list_guides(), *_scripts()]),
    ):
        _print_table(console, title, ("name", "what it is"), pairs)
    console.print("A card or a config in full: [bold]lightning-stable show NAME[/]")


def _print_table(console: "Console", title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """Print one table; names stay whole, and no word is cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Names and summaries are those of others, too: a text of rich takes brackets and colons in them for what they are.
    table = Table(title=Text(title, style="table.title"), title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "class"), overflow="fold")
    for name, *cells in rows:
        table.add_row(Text(name, style="bold"), *map(Text, cells))
    console.print(table)
