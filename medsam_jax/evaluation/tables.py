"""Writes results as CSV, Markdown and LaTeX: complete or not at all."""

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.evaluation.statistics import units
from medsam_jax.metrics import METRICS

Row = dict[str, Any]
TEXT_COLUMNS = ("task", "modality", "checkpoint", "reference")


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


def summary_table(rows: Sequence[Row], tolerance: float) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a printed table of `statistics.summarise`'s rows."""
    unit = units(rows)
    names = list(TEXT_COLUMNS if len({row["reference"] for row in rows}) > 1 else TEXT_COLUMNS[:3])
    in_heading = {"nsd": f" ({tolerance:g} {unit})", "hd95": f" ({unit})", "asd": f" ({unit})"}
    headings = [*names, "cases", "objects", "empty (missed/spurious/both)"]
    for metric, (heading, _) in METRICS.items():
        headings.append(f"{heading}{in_heading.get(metric, '')} median (IQR)")
        headings += ["mean"] if metric in ("dice", "nsd") else []
    return headings, [
        [row[name] for name in names] + _summary_numbers(row, row["unit"] != unit) for row in rows
    ]


def _summary_numbers(row: Row, with_unit: bool) -> list[str]:
    cells = [str(row["cases"]), str(row["n"])]
    cells.append("/".join(str(row[name]) for name in ("missed", "spurious", "both_empty")))
    for metric, (_, is_share) in METRICS.items():
        digits = 3 if is_share else 2
        median, low, high, mean = (
            f"{row[f'{metric}_{name}']:.{digits}f}" for name in ("median", "q1", "q3", "mean")
        )
        known = np.isfinite(row[f"{metric}_median"])
        unit = f" {row['unit']}" * (with_unit and not is_share)
        cells.append(f"{median}{unit} ({low}-{high})" if known else "-")
        if metric in ("dice", "nsd"):
            cells.append(mean if known else "-")
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
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def latex(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A LaTeX table as wide as the page at most; what stands in brackets goes to a second line."""

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
    """Quartiles, and what else ends a cell in brackets, go below: columns stay narrow."""
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
