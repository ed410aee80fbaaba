"""Compares DSC of volumes by prompting: every slice, one slice propagated, key slices.

    python scripts/propagation_table.py --manifest cases.csv --task sarcoma_ct,sarcoma_mr \\
        --embeddings /tmp/propagation_embeddings --output results/propagation

Every label of every scan is an object. Its prompts are the exact boxes of its mask on some of its
slices: on every slice; on the middle slice, propagated; on the first, middle and last slice,
interpolated. The outputs are `propagation.csv`, with a row per object, and `propagation.md`.
Embeddings (4 MB per slice) are stored in `--embeddings`: a second run encodes only new slices.
"""

import csv
from pathlib import Path

import numpy as np
from absl import flags, logging

import medsam_jax
from medsam_jax.cli import progress, run
from medsam_jax.data.manifest import FIRST, Case, read_cases
from medsam_jax.data.prompts import box_from_mask
from medsam_jax.inference.volume import VolumePredictor
from medsam_jax.io.files import keep_compiled_programs
from medsam_jax.io.geometry import slice_axis, slice_spacing
from medsam_jax.io.scans import read_mask, read_scan

_MANIFEST = flags.DEFINE_string("manifest", None, "Scans with masks, in cases.csv form.")
_TASK = flags.DEFINE_list("task", [], "Only these tasks of the manifest.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "lite_medsam", "Name or directory.")
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "Folder that keeps embeddings.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the tables.", required=True)
flags.mark_flag_as_required("manifest")

METHODS = {
    "per_slice": "a box on every slice",
    "propagated": "one box on the middle slice, propagated",
    "interpolated": "boxes on the first, middle and last slice, interpolated",
}


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    keep_compiled_programs()
    predictor = VolumePredictor(medsam_jax.load_model(_CHECKPOINT.value))
    cases = [c for c in read_cases(_MANIFEST.value) if not _TASK.value or c.task in _TASK.value]
    rows = []
    for case in progress(cases, "scans"):
        rows += score_case(predictor, case)
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "propagation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (output / "propagation.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def score_case(predictor: VolumePredictor, case: Case) -> list[dict]:
    """Returns the rows of all objects of a scan."""
    scan = read_scan(case.image)
    axis = slice_axis(scan)
    labels = np.moveaxis(read_mask(case.masks[FIRST], scan), axis, 0)
    volume, spacing = np.moveaxis(scan.array, axis, 0), slice_spacing(scan, axis)
    predictor.set_volume(volume, case.modality, case.window, spacing)
    kept = _embeddings(case)
    if kept and kept.exists():
        predictor.load_embeddings(kept)
    rows = []
    for label in np.unique(labels[labels > 0]):
        truth = labels == label
        masks = segment(predictor, truth)
        scores = {name: round(float(medsam_jax.dice(m, truth)), 4) for name, m in masks.items()}
        names = {"case_id": case.case_id, "task": case.task, "modality": case.modality}
        rows.append(names | {"label": int(label), "slices": int(truth.any((1, 2)).sum())} | scores)
    if kept:
        predictor.save_embeddings(kept)
    return rows


def _embeddings(case: Case) -> Path | None:
    """Returns the file for a scan's embeddings; None without `--embeddings`."""
    if _EMBEDDINGS.value is None:
        return None
    folder = Path(_EMBEDDINGS.value)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{case.task}_{case.case_id}.npz"


def segment(predictor: VolumePredictor, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the object's mask by each method."""
    present = np.flatnonzero(truth.any(axis=(1, 2)))
    middle = present[len(present) // 2]
    prompts = {
        "per_slice": present,
        "propagated": [middle],
        "interpolated": sorted({present[0], middle, present[-1]}),
    }
    verbs = {
        "per_slice": predictor.predict_slices,
        "propagated": predictor.propagate,
        "interpolated": predictor.interpolate,
    }
    masks = {}
    for name, slices in prompts.items():
        predictor.clear_prompts()
        for index in slices:
            predictor.add_prompt(int(index), box=box_from_mask(truth[index]))
        masks[name], _ = (predictor.predict_slices if len(present) == 1 else verbs[name])()
    return masks


def table(rows: list[dict]) -> str:
    """Returns medians, quartiles and the DSC loss against a box on every slice, per task."""
    lines = [
        "| task | prompts | n | median DSC | quartiles | median loss |",
        "|---|---|---|---|---|---|",
    ]
    for task in sorted({row["task"] for row in rows}):
        of_task = [row for row in rows if row["task"] == task]
        best = np.array([row["per_slice"] for row in of_task])
        for name, text in METHODS.items():
            dsc = np.array([row[name] for row in of_task])
            low, median, high = np.percentile(dsc, [25, 50, 75])
            loss = np.median(best) - median
            lines.append(
                f"| {task} | {text} | {len(dsc)} | {median:.3f} | {low:.3f} to {high:.3f} "
                f"| {loss:.3f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
