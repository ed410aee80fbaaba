"""Writes results as CSV, Markdown and LaTeX, each file whole or not at all."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.evaluation.statistics import Row, units
from medsam_jax.io.files import write_text
from medsam_jax.metrics import METRICS

TEXT_COLUMNS = ("task", "modality", "checkpoint", "reference", "label")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes the columns of the first row; numbers keep six decimals, NaN is `nan`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _number(value) for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def _number(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return f"{value:.6g}" if abs(value) < 1e-3 else f"{value:.6f}"
    return value


def summary_table(rows: Sequence[Row], tolerance: float) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells of a printed table of `statistics.summarise`'s rows."""
    unit = units(row["unit"] for row in rows)
    names = list(
        TEXT_COLUMNS[:4] if len({row["reference"] for row in rows}) > 1 else TEXT_COLUMNS[:3]
    )
    names += ["label"] * any("label" in row for row in rows)
    seen = any(row["trained_on"] for row in rows)
    headings = [*names, "cases", *["trained on"] * seen, "objects", "empty (missed/spurious/both)"]
    for metric in METRICS.values():
        headings.append(f"{metric.title(tolerance, unit)} median (IQR)")
        headings += ["95 % interval", "mean"] if metric.is_main else []
    return headings, [
        [row[name] for name in names] + _summary_numbers(row, row["unit"] != unit, seen)
        for row in rows
    ]


def interval(low: float, high: float, form: str) -> str:
    """Returns "low to high", "-" where it is not known."""
    return f"{low:{form}} to {high:{form}}" if np.isfinite(low) else "-"


def _summary_numbers(row: Row, with_unit: bool, seen: bool) -> list[str]:
    cells = [str(row["cases"]), *[str(row["trained_on"])] * seen, str(row["n"])]
    cells.append("/".join(str(row[name]) for name in ("missed", "spurious", "both_empty")))
    for metric in METRICS.values():
        digits = 2 if metric.is_length else 3
        median, low, high, mean = (
            f"{row[f'{metric.name}_{name}']:.{digits}f}" for name in ("median", "q1", "q3", "mean")
        )
        known = np.isfinite(row[f"{metric.name}_median"])
        unit = f" {row['unit']}" * (with_unit and metric.is_length)
        cells.append(f"{median}{unit} ({low}-{high})" if known else "-")
        if metric.is_main:
            ends = (row[f"{metric.name}_median_{end}"] for end in ("low", "high"))
            cells += [interval(*ends, ".3f"), mean if known else "-"]
    return cells


def comparison_cells(test: Row) -> list[str]:
    """Returns a row of `statistics.compare` as the cells of a printed table."""
    cells = [test["task"], test["modality"], METRICS[test["metric"]].heading]
    cells += [test["checkpoint_a"], test["checkpoint_b"], str(test["cases"])]
    cells += [f"{test['median_b_minus_a']:+.4f}"]
    cells += [interval(test["median_low"], test["median_high"], "+.4f")]
    return cells + [f"{test[name]:.2g}" for name in ("p", "p_smallest", "p_holm")]


COMPARISON_HEADINGS = ["task", "modality", "metric", "A", "B", "cases", "median B - A"]
COMPARISON_HEADINGS += ["95 % interval", "p", "smallest p", "Holm"]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def latex(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Returns a LaTeX table, at most as wide as the page; brackets go to a second line."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_latex_cell, cells)) + r" \\" + "\n"

    columns = "".join("l" if heading in TEXT_COLUMNS else "r" for heading in headings)
    body = "".join(line(row) for row in rows)
    return (
        "% Needs \\usepackage{booktabs,graphicx}\n"
        "\\begin{table*}\n\\centering\n\\footnotesize\n"
        f"\\caption{{{_escaped(caption.replace('`', ''))}}}\n"
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(headings)}\\midrule\n{body}"
        "\\bottomrule\n\\end{tabular}}\n\\end{table*}\n"
    )


def _latex_cell(text: str) -> str:
    """Puts quartiles, or other brackets that end a cell, below it: columns stay narrow."""
    found = re.fullmatch(r"(.+) \((.+)\)", text)
    if not found:
        return _escaped(text)
    above, below = map(_escaped, found.groups())
    below = re.sub(r"(?<=\d)-(?=\d)", "--", below)
    return rf"\begin{{tabular}}{{@{{}}c@{{}}}}{above}\\({below})\end{{tabular}}"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
