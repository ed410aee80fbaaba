"""Stores results as JSON, one entry per row, and writes the tables of `docs/performance.md`.

    python -m benchmarks.report --results docs/performance.json --document docs/performance.md

replaces the text between the two marks of the document by tables of the JSON file.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.harness import Measurement, Row
from medsam_jax.cli import run
from medsam_jax.errors import UserError
from medsam_jax.io.files import write_text

_RESULTS = flags.DEFINE_string("results", "docs/performance.json", "What benchmarks.run wrote.")
_DOCUMENT = flags.DEFINE_string("document", "docs/performance.md", "Where the tables go.")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLUMNS = (
    "row",
    "contender",
    "seconds",
    "items/s",
    "ratio",
    "target",
    "difference",
    "first call, s",
    "peak memory, MB",
    "memory ratio",
    "limit, s",
    "of limit",
)
EXPLANATION = """\
Seconds are medians (quartiles) of interleaved calls after warm-up; the ratio is ours over theirs,
below 1 is faster, with the quartiles of the ratio within rounds. Where contenders are variants of
ours (no difference given), the ratio is the first's time per item over this one's. Difference is
the largest of the outputs, as a fraction of the largest value. The first call includes compilation.
Memory is the peak of the whole process, libraries included (on a GPU, of the device's allocator).
The limit is the larger of matrix operations over the measured matrix peak and of bytes of arguments
and results over the measured bandwidth; "of limit" is the limit over our median."""


def entry(
    row: Row,
    measurements: list[Measurement],
    machine: Mapping[str, str],
    limits: Mapping[str, float],
    command: str,
) -> dict[str, Any]:
    """Returns one row's results as JSON types."""
    return {
        "name": row.name,
        "suite": row.suite,
        "targets": dict(row.targets),
        "memory_targets": dict(row.memory_targets),
        "precision": row.precision,
        "command": command,
        "machine": dict(machine),
        "limits": dict(limits),
        "contenders": [dataclasses.asdict(m) | {"median": m.median} for m in measurements],
    }


def merge(path: Path, entries: Iterable[dict[str, Any]], order: Iterable[str]) -> None:
    """Writes entries to a results file; they replace earlier ones of the same suite and name.

    Args:
      order: names in the order of the table; other rows follow in their current order.
    """
    rows = {(e["suite"], e["name"]): e for e in (*read(path), *entries)}
    rank = {name: position for position, name in enumerate(order)}
    ordered = sorted(rows.values(), key=lambda e: (e["suite"], rank.get(e["name"], len(rank))))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"rows": ordered}, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Reads the entries of a results file; returns an empty list if there is no file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float, float]:
    """Returns ours / theirs in time per item: ratio of medians, and quartiles over rounds."""
    items = theirs["items"] / ours["items"]
    rounds = items * np.asarray(ours["seconds"]) / np.asarray(theirs["seconds"])
    low, high = np.percentile(rounds, [25, 75])
    return items * ours["median"] / theirs["median"], float(low), float(high)


def summary(entry: dict[str, Any]) -> list[str]:
    """Returns one line per contender for the terminal."""
    ours, lines = entry["contenders"][0], []
    for result in entry["contenders"]:
        compared = "" if result is ours else f", ratio {ratio(ours, result)[0]:.2f}"
        target = entry["targets"].get(result["name"])
        compared += "" if target is None else f" (target {target:.2f})"
        lines.append(f"  {result['name']}: {_short(result['median'])} s{compared}")
    return lines


def markdown(entries: list[dict[str, Any]]) -> str:
    """Returns a Markdown section for each suite: machine, table and versions."""
    sections = []
    for suite in ("cpu", "gpu"):
        if found := [e for e in entries if e["suite"] == suite]:
            sections += [f"### Suite {suite}", "", *_machine(found), "", *_targets(found), ""]
            sections += [EXPLANATION, ""]
            sections += [_cells(COLUMNS), _cells(["---"] * len(COLUMNS))]
            sections += [line for e in found for line in _lines(e)]
            sections += ["", *_versions(found), ""]
    return "\n".join(sections)


def _targets(entries: list[dict[str, Any]]) -> list[str]:
    """Returns lines with the number of targets met and the names of missed ones."""
    met, missed = 0, []
    for e in entries:
        ours = e["contenders"][0]
        for result in e["contenders"][1:]:
            found = {
                "time": (ratio(ours, result)[0], e["targets"]),
                "memory": (ours["peak_memory"] / result["peak_memory"], e["memory_targets"]),
            }
            for what, (value, targets) in found.items():
                target = targets.get(result["name"])
                if target is not None and value > target:
                    against = f"{e['name']}, {what} against {result['name']}"
                    missed.append(f"* missed: {against}: {value:.2f}, target {target:.2f}")
                met += target is not None and value <= target
    return [f"{met} of {met + len(missed)} targets are met.", *([""] if missed else []), *missed]


def _machine(entries: list[dict[str, Any]]) -> list[str]:
    described: dict[str, set[str]] = {}
    for e in entries:
        peak, bandwidth = _peak(e), e["limits"]["bytes"]
        facts = dict(e["machine"])
        facts[f"measured {e['precision']} matrix peak, GFLOP/s"] = f"{peak / 1e9:.0f}"
        facts["measured bandwidth, GB/s"] = f"{bandwidth / 1e9:.0f}"
        for name, value in facts.items():
            described.setdefault(name, set()).add(value)
    return [
        f"* {name}: {next(iter(values)) if len(values) == 1 else _range(values)}"
        for name, values in described.items()
    ]


def _range(values: set[str]) -> str:
    try:
        low, *_, high = sorted(values, key=float)
    except ValueError:
        return "; ".join(sorted(values))
    return f"{low} to {high} before different rows"


def _peak(entry: Mapping[str, Any]) -> float:
    return entry["limits"]["operations" if entry["precision"] == "float32" else "operations_bf16"]


def _lines(entry: dict[str, Any]) -> list[str]:
    ours = entry["contenders"][0]
    return [_line(entry, ours, result) for result in entry["contenders"]]


def _line(entry: dict[str, Any], ours: dict[str, Any], result: dict[str, Any]) -> str:
    low, high = np.percentile(result["seconds"], [25, 75])
    seconds = f"{_short(result['median'])} ({_short(low)} to {_short(high)})"
    rate = f"{result['items'] / result['median']:.3g}"
    cells = [entry["name"], result["name"], seconds, rate]
    if result is ours:
        cells += ["", "", ""]
        memory = ""
    else:
        middle, low, high = ratio(ours, result)
        cells += [
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            _verdict(middle, entry["targets"].get(result["name"])),
            "" if result["difference"] is None else f"{result['difference']:.1e}",
        ]
        share = ours["peak_memory"] / result["peak_memory"]
        memory = f"{share:.2f}"
        if verdict := _verdict(share, entry["memory_targets"].get(result["name"])):
            memory += f", target {verdict}"
    limit = _limit(entry, result)
    cells += [f"{result['first_call']:.1f}", f"{result['peak_memory'] / 1e6:.0f}", memory]
    cells += [_short(limit), f"{limit / result['median']:.0%}"] if limit else ["", ""]
    return _cells(cells)


def _verdict(value: float, target: float | None) -> str:
    return "" if target is None else f"{target:.2f} {'met' if value <= target else '**missed**'}"


def _limit(entry: dict[str, Any], result: dict[str, Any]) -> float:
    operations, moved = result["operations"] or 0.0, result["bytes"] or 0.0
    return max(operations / _peak(entry), moved / entry["limits"]["bytes"])


def _short(seconds: float) -> str:
    return f"{seconds:.3g}"


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _versions(entries: list[dict[str, Any]]) -> list[str]:
    """Returns lines with versions and with environment variables of contenders."""
    every = [c for e in entries for c in e["contenders"]]
    versions = {name: version for c in every for name, version in c["versions"].items()}
    lines = ["Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + "."]
    settings = {
        c["name"]: " ".join(f"{k}={v}" for k, v in c["environment"].items())
        for c in every
        if c["environment"]
    }
    return lines + [f"{name}: `{values}`." for name, values in settings.items()]


def update(document: Path, entries: list[dict[str, Any]]) -> None:
    """Writes the tables between the marks of a document. Raises UserError if it has no marks."""
    text = document.read_text() if document.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{document}: needs one line {BEGIN} and one {END}; the tables go between")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write_text(document, f"{before}{BEGIN}\n\n{markdown(entries)}\n{END}{after}")


def main(argv) -> None:
    """Updates the tables of the document."""
    del argv
    results = Path(_RESULTS.value)
    if not results.exists():
        raise UserError(f"{results}: no such file; python -m benchmarks.run --output={results}")
    update(Path(_DOCUMENT.value), read(results))


if __name__ == "__main__":
    run(main)
