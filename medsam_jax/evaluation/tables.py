"""Writes results as CSV, Markdown and LaTeX: complete or not at all."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.evaluation.scoring import METRICS

Row = dict[str, Any]


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Columns are those of the first row; numbers keep six decimals, NaN is `nan`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _number(value) for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def _number(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return f"{value:.6g}" if abs(value) < 1e-3 else f"{value:.6f}"
    return value


def summary_headings(unit: str, tolerance: float) -> list[str]:
    """Column headings that go with `summary_cells`."""
    unit = unit.split(",")[0]
    names = {"hd95": f"HD95 ({unit})", "asd": f"ASD ({unit})", "nsd": f"NSD ({tolerance:g} {unit})"}
    columns = ["task", "modality", "checkpoint", "reference", "cases", "objects", "missed"]
    for metric, (heading, _) in METRICS.items():
        columns += [f"{names.get(metric, heading)} median (IQR)"]
        columns += ["mean"] if metric in ("dice", "nsd") else []
    return columns


def summary_cells(row: Row) -> list[str]:
    """A summary row as the cells of a printed table."""
    cells = [row["task"], row["modality"], row["checkpoint"], row["reference"]]
    cells += [str(row["cases"]), str(row["n"]), str(row["missed"])]
    for metric in METRICS:
        digits = 3 if METRICS[metric][1] else 2
        median, low, high = (row[f"{metric}_{name}"] for name in ("median", "q1", "q3"))
        cells.append(f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
        if metric in ("dice", "nsd"):
            cells.append(f"{row[f'{metric}_mean']:.{digits}f}")
    return cells


def comparison_cells(test: Row) -> list[str]:
    """A row of `statistics.compare` as the cells of a printed table."""
    cells = [test["task"], test["modality"], METRICS[test["metric"]][0]]
    cells += [test["checkpoint_a"], test["checkpoint_b"], str(test["cases"])]
    return [*cells, f"{test['median_b_minus_a']:+.4f}", f"{test['p']:.2g}", f"{test['p_holm']:.2g}"]


COMPARISON_HEADINGS = ["task", "modality", "metric", "A", "B", "cases", "median B - A", "p", "Holm"]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def latex(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A LaTeX table (booktabs); the first four columns are text."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escaped(cell) for cell in cells) + r" \\" + "\n"

    columns = "llll" + "r" * (len(headings) - 4)
    body = "".join(line(row) for row in rows)
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{_escaped(caption)}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(headings)}\\midrule\n{body}"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}"} | {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
