"""Reports a checkpoint that does not fit: all names, grouped, each with the nearest known name."""

import difflib
import math
import re
from collections.abc import Iterable

_MAX_SUGGESTIONS = 40  # groups with a search for a near name; each search compares all names
_MAX_NUMBERS = 8  # in a name that is grouped
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def describe(unused: list[str], unfilled: list[str], wrong: list[str], known: Iterable[str]) -> str:
    """Returns a text of several lines: counts first, then each list in groups.

    Args:
      unused: names in the file that the model lacks.
      unfilled: names in the model that the file lacks.
      wrong: messages about single tensors, shown unchanged.
      known: all names of the model, for suggestions.
    """
    counts = [
        f"{len(names)} {kind}"
        for names, kind in ((unused, "unknown"), (unfilled, "missing"), (wrong, "unfitting"))
        if names
    ]
    lines = [", ".join(counts) + " tensors"]
    patterns = sorted({"*".join(_words(name)) for name in known})
    lines += _section("in the file, not in the model:", unused, patterns)
    lines += _section("in the model, not in the file:", unfilled, [])
    if wrong:
        lines += ["  of the wrong kind:", *(f"    {text}" for text in wrong)]
    return "\n".join(lines)


def _section(title: str, names: list[str], known_patterns: list[str]) -> list[str]:
    if not names:
        return []
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(_words(name), []).append(name)
    lines = [f"  {title}"]
    for index, (words, members) in enumerate(groups.items()):
        near = []
        if index < _MAX_SUGGESTIONS and known_patterns:
            near = difflib.get_close_matches("*".join(words)[:200], known_patterns, n=1)
        hint = f"   (nearest known: {near[0]})" if near and near[0] != "*".join(words) else ""
        lines += [f"    {text}{hint}" for text in _list(words, members)]
    return lines


def _words(name: str) -> tuple[str, ...]:
    """Returns the parts of a name between its numbers."""
    words = tuple(_NUMBER.split(name))
    return words if len(words) <= _MAX_NUMBERS + 1 else (name,)


def _list(words: tuple[str, ...], members: list[str]) -> list[str]:
    """Returns the members abbreviated: numbers that occur in all combinations go into braces."""
    numbers = [tuple(_NUMBER.findall(member)) if len(words) > 1 else () for member in members]
    return [_printable(_join(words, columns)) for columns in _boxes(numbers)]


def _boxes(rows: list[tuple[str, ...]]) -> list[list[list[str]]]:
    """Splits rows of numbers into groups that hold every combination of their columns' values."""
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    if math.prod(map(len, columns)) == len(rows):
        return [columns]
    split = next(index for index, values in enumerate(columns) if len(values) > 1)
    groups = [[row for row in rows if row[split] == value] for value in columns[split]]
    return [box for group in groups for box in _boxes(group)]


def _join(words: tuple[str, ...], columns: list[list[str]]) -> str:
    numbers = [values[0] if len(values) == 1 else f"{{{','.join(values)}}}" for values in columns]
    return words[0] + "".join(n + word for n, word in zip(numbers, words[1:], strict=True))


def _printable(name: str) -> str:
    return ascii(name[:300])[1:-1]
