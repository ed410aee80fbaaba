"""Stores the counts of `benchmarks.accelerators` as JSON and writes their tables into the docs."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.targets import GIB
from medsam_jax.errors import UserError
from medsam_jax.io.files import write_text

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- accelerators: begin -->", "<!-- accelerators: end -->"
COLUMNS = ("program", "device", "TFLOP", "HBM, GB", "kernels", "loops", "collectives")
COLUMNS += ("arguments, GiB", "temporaries, GiB", "at least, ms", "bound by", "compiled in, s")


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a results file; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def merge(path: Path, row: dict[str, Any]) -> None:
    """Writes a row to a results file; it replaces the earlier one of the same name."""
    rows = {(r["program"], r["target"]): r for r in (*read(path), row)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"rows": [*rows.values()]}, indent=1) + "\n")


def bound(row: Mapping[str, Any]) -> tuple[float, str]:
    """Returns the least time of a row, seconds, and what it is spent on."""
    kind = max(row["times"], key=row["times"].get)
    return row["times"][kind], kind


def summary(row: Mapping[str, Any]) -> str:
    """Returns one line for the terminal."""
    name = f"{row['program']} on {row['target']}: "
    if "times" not in row:
        return name + row["error"]
    seconds, kind = bound(row)
    text = (
        f"{row['traffic'] / 1e9:.2f} GB, {row['kernels']} kernels, {row['loops']} loops, "
        f"{row['peak'] / GIB:.2f} GiB, {seconds * 1e3:.2f} ms by {kind}, compiled in "
        f"{row['compile_seconds']:.0f} s"
    )
    return name + text + (f"; {row['error']}" if row["error"] else "")


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["program"], row["target"]]
    if "times" not in row:
        reason = row["error"].replace("|", "\\|")
        return _cells([*cells, f"**{reason}**", *[""] * (len(COLUMNS) - 3)])
    seconds, kind = bound(row)
    links = ""
    if row["collectives"]:
        links = f"{row['collectives']}, {row['collective_bytes'] / 1e9:.2f} GB"
    loops = str(row["loops"])
    if row["unknown_trips"]:
        loops += f" ({row['unknown_trips']} of unknown length)"
    cells += [
        f"{sum(row['operations'].values()) / 1e12:.3g}",
        f"{row['traffic'] / 1e9:.3g}",
        str(row["kernels"]),
        loops,
        links,
        f"{row['arguments'] / GIB:.2f}",
        f"{row['temporaries'] / GIB:.2f}",
        f"{seconds * 1e3:.3g}",
        kind if not row["error"] else f"**{row['error']}**",
        f"{row['lower_seconds'] + row['compile_seconds']:.0f}",
    ]
    return _cells(cells)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the table of all rows, by program."""
    lines = [_cells(COLUMNS), _cells(["---"] * len(COLUMNS))]
    lines += [_line(row) for row in rows]
    versions = ", ".join(sorted({row["jax"] for row in rows if "jax" in row}))
    return "\n".join([*lines, "", f"jax {versions}."])


def update(results: Path) -> None:
    """Writes the tables between the marks of docs/performance.md."""
    replace_between(DOCS / "performance.md", BEGIN, END, markdown(read(results)))


def replace_between(document: Path, begin: str, end: str, text: str) -> None:
    """Replaces the text between two marks. Raises UserError if the document lacks them."""
    old = document.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise UserError(f"{document}: needs one line {begin} and one {end}")
    before, rest = old.split(begin)
    _, after = rest.split(end)
    write_text(document, f"{before}{begin}\n\n{text}\n{end}{after}")
