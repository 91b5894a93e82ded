"""Which of the free variables a config refers to."""

import re

__all__ = ["used_variables"]

_USE = re.compile(r"\$\{\.*(?:\w+\.)*vars\.(\w+)")


def used_variables(text: str) -> set[str]:
    """Return the names of the variables that a text refers to, as in ``${vars.lr}``."""
    return set(_USE.findall(text))
