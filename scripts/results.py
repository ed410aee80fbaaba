"""Makes the tables of docs/results.md: several models on the same objects with the same prompts.

    python scripts/results.py --internal sarcoma/cases.csv --external demo/scans/cases.csv \
        --model "LiteMedSAM=lite_medsam" --model "fine-tuned=runs/a/best+runs/b/best" \
        --output runs/results --page docs/results.md

The script runs `python -m medsam_jax.evaluate` on the validation rows of `--internal` and on all
rows of the `--external` manifests; a killed evaluation is resumed. A model may have several
checkpoints, one per seed, joined by +. Its cells have the mean and the range of their scores. The
tables go to results.md in `--output`, or, with `--page`, between the markers in that page, whose
other text is kept.
"""

import csv
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from medsam_jax.cli import run
from medsam_jax.data.manifest import FIRST, read_manifest, write_manifest
from medsam_jax.errors import UserError
from medsam_jax.evaluation.tables import markdown
from medsam_jax.io.files import write_text

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
LEGEND = (
    "Median (first to third quartile), and the mean below it. Of several checkpoints: the mean "
    "over them of each, with the range."
)
# Table heading -> file and column.
TABLES = {
    "DSC, whole objects in 3D (pictures in 2D)": ("per_object.csv", "dice"),
    "NSD at 2 mm, whole objects in 3D (pictures at 2 px in 2D)": ("per_object.csv", "nsd"),
    "DSC, slice by slice": ("per_slice.csv", "dice"),
    "NSD at 2 px, slice by slice": ("per_slice.csv", "nsd"),
}

Row = dict[str, str]


def main(_) -> None:
    models = parse_models(_MODELS.value)
    output = Path(_OUTPUT.value)
    page, text = output / "results.md", f"{BEGIN}{END}\n"
    if _PAGE.value:
        page = Path(_PAGE.value)
        text = page.read_text(encoding="utf-8") if page.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{page}: needs the lines {BEGIN} and {END} once each, around the tables")
    groups: dict[str, Sequence[Path]] = {"external": [Path(path) for path in _EXTERNAL.value]}
    if _INTERNAL.value:
        groups = {"internal": [Path(_INTERNAL.value)]} | groups
    scores = {}
    for name, manifests in groups.items():
        if manifests:
            split = "validation" if name == "internal" else None
            merge_manifests(manifests, output / f"{name}.csv", split, _LEAVE_OUT.value)
            evaluate(models, output / f"{name}.csv", output / name)
            scores[name] = {
                file: against_first(read_csv(output / name / file))
                for file in ("per_object.csv", "per_slice.csv")
            }
    command = shlex.join(["python", "scripts/results.py", *sys.argv[1:]])
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n\n{tables(scores, models, command)}{END}{after}")
    print(page.resolve())


def parse_models(given: Sequence[str]) -> dict[str, list[str]]:
    """Returns name -> checkpoints from NAME=CHECKPOINT[+CHECKPOINT...]."""
    models = {}
    for one in given:
        name, _, checkpoints = one.partition("=")
        if not (name and checkpoints) or name in models:
            raise UserError(f"--model: {one!r}; give NAME=CHECKPOINT[+CHECKPOINT...], a name once")
        models[name] = checkpoints.split("+")
    return models


def merge_manifests(
    manifests: Sequence[Path], path: Path, split: str | None, leave_out: Sequence[str]
) -> None:
    """Writes one manifest of the selected rows: absolute paths, CT windows, all annotators."""
    rows = []
    for manifest in manifests:
        cases, problems = read_manifest(manifest)
        if problems:
            raise UserError("; ".join(problems))
        wanted = [case for case in cases if split in (None, case.split)]
        rows += [case.to_row() for case in wanted if case.task not in leave_out]
    if not rows:
        raise UserError(f"{', '.join(map(str, manifests))}: no row of split {split} is left")
    write_manifest(path, rows)


def against_first(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows scored against the first annotator, whose masks define the prompts."""
    return [row for row in rows if row["reference"] == FIRST]


def evaluate(models: dict[str, list[str]], manifest: Path, output: Path) -> None:
    """Runs `medsam_jax.evaluate` on all checkpoints."""
    checkpoints = [checkpoint for seeds in models.values() for checkpoint in seeds]
    command = [sys.executable, "-m", "medsam_jax.evaluate", "--checkpoint", ",".join(checkpoints)]
    command += ["--manifest", str(manifest), "--output", str(output), f"--seed={_SEED.value}"]
    print(shlex.join(command), flush=True)
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise UserError(f"{manifest}: the evaluation failed; see its message above")


def tables(
    scores: dict[str, dict[str, list[Row]]], models: dict[str, list[str]], command: str
) -> str:
    """Returns the Markdown between the markers."""
    lines = [f"Made by\n\n```\n{command}\n```\n\n"]
    lines += ["| model | checkpoints |\n| --- | --- |\n"]
    lines += [
        f"| {name} | {', '.join(f'`{c}`' for c in seeds)} |\n" for name, seeds in models.items()
    ]
    for heading, (file, metric) in TABLES.items():
        lines += [f"\n### {heading}\n\n{LEGEND}\n\n"]
        cells = []
        for data, files in scores.items():
            rows = files[file]
            for task, modality in dict.fromkeys((row["task"], row["modality"]) for row in rows):
                members = [r for r in rows if (r["task"], r["modality"]) == (task, modality)]
                one = [r for r in members if r["checkpoint"] == members[0]["checkpoint"]]
                cases = len({row["case_id"] for row in one})
                named = [data, f"{task}, {modality}", str(cases), str(len(one))]
                cells.append(named + [cell(members, seeds, metric) for seeds in models.values()])
        what = "slices" if file == "per_slice.csv" else "objects"
        lines += [markdown(["data", "task", "cases", what, *models], cells)]
    return "".join(lines) + "\n"


def cell(rows: Sequence[Row], checkpoints: Sequence[str], metric: str) -> str:
    """Returns median and quartiles of one checkpoint, or mean and range of several."""
    quartiles, means = [], []
    for checkpoint in checkpoints:
        values = np.array([float(row[metric]) for row in rows if row["checkpoint"] == checkpoint])
        values = values[np.isfinite(values)]
        quartiles.append(np.quantile(values, (0.25, 0.5, 0.75)))
        means.append(values.mean())
    if len(checkpoints) == 1:
        low, middle, high = quartiles[0]
        return f"{middle:.3f} ({low:.3f}-{high:.3f})<br>{means[0]:.3f}"
    lines = []
    for values in ([middle for _, middle, _ in quartiles], means):
        lines.append(f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
    return "<br>".join(lines)


def read_csv(path: Path) -> list[Row]:
    """Reads rows by column name."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a manifest in cases.csv form")
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    _INTERNAL = flags.DEFINE_string("internal", None, "Manifest of the data that was trained on.")
    _EXTERNAL = flags.DEFINE_multi_string(
        "external", [], "Manifest of other data; may be repeated."
    )
    _MODELS = flags.DEFINE_multi_string("model", None, "NAME=CHECKPOINT[+CHECKPOINT...]; repeated.")
    _OUTPUT = flags.DEFINE_string(
        "output", "runs/results", "Folder for what the evaluations write."
    )
    _PAGE = flags.DEFINE_string(
        "page", None, "Page whose tables are replaced; by default results.md in --output."
    )
    _LEAVE_OUT = flags.DEFINE_list(
        "leave_out",
        ["organs_ct", "organs_mr"],
        "Tasks to leave out; by default machine-made masks.",
    )
    _SEED = flags.DEFINE_integer("seed", 0, "Of the prompts.")
    flags.mark_flags_as_required(["model"])
    run(main)
