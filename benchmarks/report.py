"""Results of a run as JSON, and as the Markdown table that `docs/performance.md` holds."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from benchmarks.harness import Measurement, Row


def ratio(ours: Measurement, theirs: Measurement) -> tuple[float, float, float]:
    """Ours over theirs: the ratio of medians, and the quartiles of the ratio within rounds."""
    rounds = np.asarray(ours.seconds) / np.asarray(theirs.seconds)
    low, high = np.percentile(rounds, [25, 75])
    return ours.median / theirs.median, float(low), float(high)


def markdown(
    results: list[tuple[Row, list[Measurement]]], machine: dict, limits: dict, command: str
) -> str:
    """The whole report. Ratios are ours over theirs, so below 1 is faster."""
    lines = ["Made by `" + command + "`.", ""]
    lines += [f"* {key}: {value}" for key, value in machine.items()]
    lines += [
        f"* measured peak: {limits['operations'] / 1e9:.0f} GFLOP/s in float32 matrix products, "
        f"{limits['bytes'] / 1e9:.0f} GB/s",
        "",
        "Seconds are medians (quartiles) of interleaved calls after warm-up; ratio is ours over "
        "theirs, with the quartiles of the ratio within rounds. Difference is the largest, as a "
        "fraction of the largest output. Memory is the peak of the whole process. Limit is the "
        "time that the counted operations need at the measured peak.",
        "",
        "| row | contender | seconds | ratio | target | difference | first call, s "
        "| peak memory, MB | memory ratio | limit, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, measurements in results:
        lines += [_line(row, measurements[0], result, limits) for result in measurements]
    versions = {k: v for _, found in results for m in found for k, v in m.versions.items()}
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + "."]
    for name, settings in _settings(results).items():
        lines.append(f"{name}: `{settings}`.")
    return "\n".join(lines) + "\n"


def _line(row: Row, ours: Measurement, result: Measurement, limits: dict) -> str:
    low, high = np.percentile(result.seconds, [25, 75])
    cells = [row.name, result.name, f"{result.median:.3f} ({low:.3f} to {high:.3f})"]
    if result is ours:
        limit = f"{result.operations / limits['operations']:.3f}" if result.operations else ""
        cells += ["", "", ""]
        memory = ""
    else:
        limit = ""
        memory = f"{ours.peak_memory / result.peak_memory:.2f}"
        middle, low, high = ratio(ours, result)
        target = row.targets.get(result.name)
        verdict = (
            "" if target is None else f"{target:.2f} {'met' if middle <= target else 'missed'}"
        )
        cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})", verdict, f"{result.difference:.1e}"]
    cells += [f"{result.first_call:.1f}", f"{result.peak_memory / 1e6:.0f}", memory, limit]
    return "| " + " | ".join(cells) + " |"


def _settings(results: list[tuple[Row, list[Measurement]]]) -> dict[str, str]:
    """Environment of the contenders that need one, such as allocator settings."""
    return {
        m.name: " ".join(f"{k}={v}" for k, v in m.environment.items())
        for _, measurements in results
        for m in measurements
        if m.environment
    }


def write(folder: Path, results, machine: dict, limits: dict, command: str) -> None:
    """Writes `results.json` and `results.md` into the folder, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "command": command,
        "machine": machine,
        "limits": limits,
        "rows": [
            {"name": row.name, "targets": dict(row.targets)}
            | {"contenders": [dataclasses.asdict(m) | {"median": m.median} for m in found]}
            for row, found in results
        ],
    }
    texts = {
        "results.json": json.dumps(data, indent=1),
        "results.md": markdown(results, machine, limits, command),
    }
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, folder / name)
