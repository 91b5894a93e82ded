"""What a parser expected of a value, in plain words, out of its nested message."""

import re

__all__ = ["explain_value", "inner_problem"]

_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":')
_CLASS = re.compile(r"^(?P<indent> *)(?:- )?Problem with given class_path '(?P<path>[^']+)':", re.MULTILINE)
_ONE_TYPE = re.compile(r"Expected an? (?P<types>.+?)\. Got value: (?P<value>.*)")
_TYPES = re.compile(r"Subtypes: \[(?P<types>.*)\]$", re.MULTILINE)
_VALUE = re.compile(r"Given value: (?P<value>.*)$", re.MULTILINE)
_NAMED = re.compile(r"<(?:class|enum) '(?P<name>[^']+)'>")

# One of a kind, and several in a list.
_WORDS = {
    "int": ("a whole number", "whole numbers"),
    "float": ("a number", "numbers"),
    "str": ("a text", "texts"),
    "bool": ("true or false", "values true or false"),
    "dict": ("a mapping", "mappings"),
    "list": ("a list", "lists"),
    "NoneType": ("null", "nulls"),
}
_LISTS = ("list", "List", "Sequence", "Iterable", "tuple", "Tuple")


def explain_value(message: str) -> str | None:
    """Return which value is wrong, what is expected of it and what it is; ``None`` if the message is about none.

    Args:
        message: What the parser says, of one key.
    """
    places: list[str] = []
    body = message
    while found := _KEY.search(body):
        body = body[found.end() :]
        inner = _CLASS.search(body)
        if inner is None:
            reason = _reason(body)
            return None if reason is None else ": ".join([*places, found["key"], reason])
        places += [found["key"], inner["path"].rpartition(".")[2]]
        body = inner_problem(body)
    return None


def inner_problem(message: str) -> str:
    """Return what is said about the first class of a message, without what follows on a level above."""
    found = _CLASS.search(message)
    if found is None:
        return message
    kept: list[str] = []
    for line in message[found.end() :].splitlines():
        if line.strip() and len(line) - len(line.lstrip()) <= len(found["indent"]) and kept:
            break
        kept.append(line)
    return "\n".join(kept)


def _reason(body: str) -> str | None:
    """Return what is expected of a value and what it is."""
    found = _TYPES.search(body)
    given = _VALUE.search(body)
    if found is None or given is None:
        found = given = _ONE_TYPE.search(body)
    if found is None or given is None:
        return None
    types, value = _split(found["types"]), given["value"].strip()
    reason = f"expected {_either([_word(kind) for kind in types])}, got {value or 'nothing'}."
    if not value or value[0] in "[{(":
        return reason
    of = [_parts(kind)[1] for kind in types if _parts(kind)[0] in _LISTS]
    if of and of[0] in ("int", "float", "str"):
        reason += f" Write a list, as in {[value] if of[0] == 'str' else f'[{value}]'}."
    return reason


def _either(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _word(kind: str, several: bool = False) -> str:
    """Return a type in words."""
    name, arguments = _parts(kind)
    if name == "Literal":
        return f"one of {arguments}"
    if name in _LISTS and arguments:
        return f"{'lists' if several else 'a list'} of {_word(_split(arguments)[0], several=True)}"
    if name in _WORDS:
        return _WORDS[name][several]
    return f"objects of {name}" if several else f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _parts(kind: str) -> tuple[str, str]:
    """Return the bare name of a type and its arguments."""
    named = _NAMED.fullmatch(kind.strip())
    name, bracket, arguments = (named["name"] if named else kind.strip()).partition("[")
    return name.rpartition(".")[2], arguments.removesuffix("]") if bracket else ""


def _split(types: str) -> list[str]:
    """Return the types of a list of types: parts between the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in types:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
