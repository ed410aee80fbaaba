"""The report of a checkpoint that does not fit a model: every name, grouped, with the likely meaning."""

import difflib
import re
from collections.abc import Iterable

_MAX_SUGGESTIONS = 40  # groups that are searched for a near name; each search looks at all names


def describe(unused: list[str], unfilled: list[str], wrong: list[str], known: Iterable[str]) -> str:
    """A multi-line text: counts first, then each list in groups.

    Args:
      unused: names of the file that the model has no place for.
      unfilled: names of the model that the file lacks.
      wrong: complaints about single tensors, shown as they are.
      known: all names of the model, for suggestions.
    """
    counts = [
        f"{len(names)} {kind}"
        for names, kind in ((unused, "unknown"), (unfilled, "missing"), (wrong, "unfitting"))
        if names
    ]
    lines = [", ".join(counts) + " tensors"]
    patterns = sorted({_pattern(name) for name in known})
    lines += _section("in the file, not in the model:", unused, patterns)
    lines += _section("in the model, not in the file:", unfilled, [])
    if wrong:
        lines += ["  of the wrong kind:", *(f"    {text}" for text in wrong)]
    return "\n".join(lines)


def _section(title: str, names: list[str], known_patterns: list[str]) -> list[str]:
    if not names:
        return []
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), []).append(name)
    lines = [f"  {title}"]
    for index, (pattern, members) in enumerate(groups.items()):
        near = []
        if index < _MAX_SUGGESTIONS and known_patterns:
            near = difflib.get_close_matches(pattern[:200], known_patterns, n=1)
        hint = f"   (nearest known: {near[0]})" if near and near[0] != pattern else ""
        lines.append(f"    {_list(pattern, members)}{hint}")
    return lines


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _list(pattern: str, members: list[str]) -> str:
    """One name as it is; several as their pattern with the numbers that stand for the stars."""
    if len(members) == 1:
        return _printable(members[0])
    numbers = [re.findall(r"\d+", member) for member in members]
    columns = list(zip(*numbers, strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    if len(varying) == 1:
        values = iter([column[0] if column not in varying else None for column in columns])
        spread = "{" + ",".join(varying[0]) + "}"
        return _printable(re.sub(r"\*", lambda _: next(values) or spread, pattern))
    return ", ".join(map(_printable, members))


def _printable(name: str) -> str:
    return ascii(name[:300])[1:-1]
