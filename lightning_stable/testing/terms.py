"""Over what each test of the suite runs: rows of some kinds or pairs of rows, and the cases of its contract."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from lightning_stable.registry import nearest

if TYPE_CHECKING:
    from lightning_stable.testing.rows import Row

__all__ = ["CONTRACTS", "EVERY_KIND", "Terms", "check_names", "pairs_of", "terms", "terms_of"]

EVERY_KIND = ("callback", "strategy", "precision", "peft", "metric")
"""What a method may plug into."""

CONTRACTS = (
    "resume",
    "yaml",
    "inert",
    "two processes",
    "oracle",
    "exception",
    "reuse",
    "any module",
    "safe load",
    "company",
    "precision",
    "card",
)
"""The contracts, as a row's expected failures and the file of capabilities name them; the tenth is two of them."""

Function = TypeVar("Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Terms:
    """Over what a test runs.

    Attributes:
        contract: One of :data:`CONTRACTS`.
        kinds: The kinds of its rows.
        partners: The kinds of the rows that come second, if it runs over pairs.
        argument: The argument that takes a case, if it has several.
        cases: The cases, by name.
        label: What its only case is called in the file of capabilities.
    """

    contract: str
    kinds: tuple[str, ...] = EVERY_KIND
    partners: tuple[str, ...] = ()
    argument: str = ""
    cases: tuple[str, ...] = ()
    label: str = "all"

    def choose(self, rows: "Sequence[Row]", companions: "Sequence[Row]") -> "list[tuple[Row, ...]]":
        """Return the rows, or the pairs of them, over which the test runs."""
        if self.partners:
            return [*pairs_of(self.kinds, self.partners, rows, companions)]
        return [(row,) for row in rows if row.kind in self.kinds]

    def parametrize(self, metafunc: pytest.Metafunc, rows: "Sequence[Row]", companions: "Sequence[Row]") -> None:
        """Give a test its rows and cases; what a row says cannot hold is a strict expected failure with its reason."""
        chosen = []
        for each in self.choose(rows, companions):
            reason = "" if self.partners else each[0].settings.expected_failures.get(self.contract)
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            chosen.append(pytest.param(*each, id="-".join(row.name for row in each), marks=marks))
        metafunc.parametrize(("row", "other") if self.partners else "row", chosen)
        if self.argument:
            metafunc.parametrize(self.argument, self.cases)


def terms(contract: str, **settings: Any) -> Callable[[Function], Function]:
    """Say over what a test of the suite runs: the arguments are those of :class:`Terms`."""

    def decorate(function: Function) -> Function:
        vars(function)["terms"] = Terms(contract, **settings)
        return function

    return decorate


def terms_of(function: Any) -> Terms | None:
    """Return over what a test runs, if it is one of the suite."""
    found = getattr(function, "terms", None)
    return found if isinstance(found, Terms) else None


def pairs_of(
    kinds: tuple[str, ...], partners: tuple[str, ...], rows: "Sequence[Row]", companions: "Sequence[Row]"
) -> "Iterable[tuple[Row, Row]]":
    """Yield the pairs of rows, of which the first is of one of ``kinds`` and the second of one of ``partners``.

    Of two callbacks there are both orders: hooks run in the order in which callbacks are given. Of two other rows there
    is one. Companions are not beside each other, and a row that names its company is beside no other.
    """
    own = {row.name for row in rows}
    everyone = [*rows, *companions]
    for (first, row), (second, other) in itertools.permutations(enumerate(everyone), 2):
        both_orders = row.kind == other.kind == "callback"
        alike = row.kind in partners and other.kind in kinds
        if row.kind not in kinds or other.kind not in partners or (alike and not both_orders and second < first):
            continue
        if {row.name, other.name} & own and _meet(row, other) and _meet(other, row):
            yield row, other


def _meet(row: "Row", other: "Row") -> bool:
    return row.settings.company is None or other.name in row.settings.company


def check_names(row: "Row", modules: Iterable[str]) -> None:
    """Refuse a row that names a contract or a kind of module that there is not.

    Raises:
        ValueError: The message suggests the near names.
    """
    allowed = {
        "expected_failures": [name for name in CONTRACTS if name != "company"],
        "refused_modules": [*modules],
    }
    for attribute, names in allowed.items():
        for name in getattr(row.settings, attribute):
            if name not in names:
                raise ValueError(f"{attribute} of {row.name!r} names {name!r}. {nearest(name, names)}")
