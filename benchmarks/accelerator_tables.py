"""Stores the counts of `benchmarks.accelerators` as JSON and writes their tables into the docs."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.targets import GIB, Target
from medsam_jax.errors import UserError
from medsam_jax.io.files import write_text

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = ("program", "device", "TFLOP", "HBM, GB", "kernels", "loops", "collectives")
COLUMNS += ("arguments, GiB", "temporaries, GiB", "at least, ms", "bound by", "compiled in, s")

# Program, device, quantity, its value at the outset and the most that it may be.
TARGETS = (
    ("encoder vit_b, batch 1", "v5e", "traffic", 39e9, 3.5e9),
    ("encoder vit_b, batch 1", "h100", "traffic", 28e9, 3.5e9),
    ("encoder lite_medsam, batch 8", "v5e", "traffic", 31e9, 5e9),
    ("encoder lite_medsam, batch 8", "h100", "traffic", 25e9, 5e9),
    ("train medsam_v2, batch 1", "h100", "traffic", 137e9, 15e9),
    ("train lite_medsam, cached, dtype bfloat16", "h100", "kernels", 1110, 300),
    ("decoder lite_medsam, boxes 1", "h100", "kernels", 557, 150),
    ("decoder lite_medsam, boxes 1", "h100", "loops", 1, 0),
    ("encoder lite_medsam, batch 1", "h100", "kernels", 523, 250),
    ("train medsam_v2, batch 1", "v5e", "compile_seconds", None, 90),
)


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


def targets_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of `TARGETS`, with what binds the programs that miss theirs."""
    counted = {(row["program"], row["target"]): row for row in rows if "times" in row}
    lines = [_cells(("program", "device", "quantity", "before", "at most", "now", ""))]
    lines += [_cells(["---"] * 7)]
    for program, target, quantity, before, most in TARGETS:
        name, scale = _QUANTITIES[quantity]
        cells = [program, target, name, "" if before is None else f"{before / scale:g}"]
        cells.append(f"{most / scale:g}")
        row = counted.get((program, target))
        if row is None:
            lines.append(_cells([*cells, "", "not compiled"]))
            continue
        verdict = "met" if row[quantity] <= most else f"**missed**, bound by {bound(row)[1]}"
        lines.append(_cells([*cells, f"{row[quantity] / scale:.3g}", verdict]))
    return "\n".join(lines)


_QUANTITIES = {
    "traffic": ("HBM, GB", 1e9),
    "kernels": ("kernels", 1),
    "loops": ("loops", 1),
    "compile_seconds": ("compiled in, s", 1),
}


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Returns the memory of the training steps on one device, as its compiler plans it."""
    columns = "step", "device", "arguments", "temporaries", "peak", "of the device"
    lines = [_cells(columns), _cells(["---"] * len(columns))]
    for row in sorted(rows, key=lambda row: row["program"]):
        if not row["program"].startswith("train ") or "times" not in row:
            continue
        sizes = [f"{row[name] / GIB:.2f}" for name in ("arguments", "temporaries", "peak")]
        chip = Target.named(row["target"]).chip
        share = f"{row['peak'] / chip.memory:.0%} of {chip.memory / GIB:.0f}"
        lines.append(_cells([row["program"].removeprefix("train "), row["target"], *sizes, share]))
    return "\n".join(lines)


def update(results: Path) -> None:
    """Writes the tables between the marks of docs/performance.md and docs/training.md."""
    rows = read(results)
    replace_between(DOCS / "performance.md", "accelerator targets", targets_table(rows))
    replace_between(DOCS / "performance.md", "accelerators", markdown(rows))
    replace_between(DOCS / "training.md", "memory", memory_table(rows))


def replace_between(document: Path, name: str, text: str) -> None:
    """Replaces the text between the marks of a name. Raises UserError if there are none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = document.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise UserError(f"{document}: needs one line {begin} and one {end}")
    before, rest = old.split(begin)
    _, after = rest.split(end)
    write_text(document, f"{before}{begin}\n\n{text}\n{end}{after}")
