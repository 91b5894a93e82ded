"""Names of layers in a few words, and what is said of them at the start of a fit."""

from collections.abc import Iterable, Iterator

from torch import nn

from lightning_stable.functional.simulated import layer_names, matches, unconvertible

__all__ = ["grouped", "layers_line", "unused_patterns"]

# How many names, or groups of them, a list shows.
_MOST = 12


def grouped(names: Iterable[str]) -> str:
    """List dotted names, with those that differ by numbers alone as one, as in ``layers.{0..3}.mlp``."""
    shapes: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    counted = 0
    for name in names:
        parts = name.split(".")
        shape = tuple("" if part.isdigit() else part for part in parts)
        shapes.setdefault(shape, []).append(tuple(int(part) for part in parts if part.isdigit()))
        counted += 1
    shown: list[str] = []
    covered = 0
    for shape, numbers in shapes.items():
        for text, many in _of_one_shape(shape, numbers):
            if len(shown) == _MOST:
                return f"{', '.join(shown)} and {counted - covered} more"
            shown.append(text)
            covered += many
    return ", ".join(shown) or "none"


def layers_line(module: nn.Module, names: list[str], include: list[str], exclude: list[str]) -> str:
    """Say which layers are converted, which are left out, and which cannot be converted and why."""
    left = [name for name in layer_names(module) if name not in set(names)]
    text = f"Converted: {grouped(names)}. Left out: {grouped(left)}."
    alike: dict[str, list[str]] = {}
    for name, reason in unconvertible(module, include, exclude).items():
        alike.setdefault(reason, []).append(name)
    reasons = ", ".join(f"'{grouped(each)}' ({reason})" for reason, each in alike.items())
    return f"{text} Not quantized: {reasons}." if reasons else text


def unused_patterns(
    module: nn.Module, names: list[str], include: Iterable[str], exclude: Iterable[str]
) -> Iterator[str]:
    """Yield a warning for each pattern that a user gave and that does nothing.

    Args:
        module: The module whose layers were converted.
        names: Those that were.
        include: The user's own patterns of what is converted.
        exclude: The user's own patterns of what is not.
    """
    layers = layer_names(module)
    there = f"The layers that can be quantized are {grouped(layers)}."
    chosen = [each for name in names for each in layers.get(name, [name])]
    everything = [each for all_names in layers.values() for each in all_names]
    everything += list(unconvertible(module))
    for pattern in include:
        if any(matches(name, [pattern]) for name in chosen):
            continue
        found = any(matches(name, [pattern]) for name in everything)
        why = "all that it matches is left out by exclude, or cannot be" if found else "it matches no layer"
        yield f"include has {pattern!r}, by which nothing is converted: {why}. {there}"
    for pattern in exclude:
        if any(matches(name, [pattern]) for name in everything):
            continue
        blocks = [name for name, _ in module.named_modules() if name and matches(name, [pattern])]
        # A module without layers in it stays as it is, as was wanted.
        if not blocks or any(name.startswith(f"{block}.") for block in blocks for name in everything):
            inside = f" For all within {blocks[0]!r} write '{blocks[0]}.*'." if blocks else ""
            yield f"exclude has {pattern!r}, which matches no layer and leaves nothing out.{inside} {there}"


def _of_one_shape(shape: tuple[str, ...], numbers: list[tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    """Yield texts for names of one shape, and how many each stands for: one text if their numbers combine freely."""
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    combined = 1
    for column in columns:
        combined *= len(column)
    if combined == len(numbers):
        yield _filled(shape, [_run(column) for column in columns]), combined
        return
    for each in numbers:
        yield _filled(shape, [str(number) for number in each]), 1


def _filled(shape: tuple[str, ...], numbers: list[str]) -> str:
    rest = iter(numbers)
    return ".".join(part or next(rest) for part in shape)


def _run(numbers: list[int]) -> str:
    """Return sorted numbers as ``3``, or as ``{0..2,5}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(texts) + "}"
