"""Compares automatic masks by points with segment_anything's on real pictures; prints a table.

    python -m tests.parity.automatic_table --checkpoint runs/points/best --scans demo/scans \\
        --nuclei img2d.tif --ultrasound liver.png --output docs/automatic_parity.md

The checkpoint is a LiteMedSAM trained with points. It is exported to `.pth` and loaded by the
PyTorch model; `SamAutomaticMaskGenerator` and ours then get the same pictures and parameters. The
scans are those of `scripts/demo_scans.py`, the nuclei `stardist/data/images/img2d.tif` of the
package stardist 0.9.2, the ultrasound any picture. Times are without compilation, in one process.
"""

import dataclasses
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from absl import flags

import medsam_jax
from medsam_jax.cli import run
from medsam_jax.data.preprocess import normalise_intensity
from medsam_jax.data.recipes import get_recipe
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator
from medsam_jax.io.scans import read_mask, read_scan
from tests.parity.matching import count_matched
from tests.parity.torch_models import (
    LiteTransform,
    lite_medsam_as_sam,
    load_torch_lite_medsam,
    stub_torchvision,
)

with stub_torchvision():
    from segment_anything import SamAutomaticMaskGenerator

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Checkpoint directory.", required=True)
_SCANS = flags.DEFINE_string("scans", "demo/scans", "Folder of the demo's scans.")
_NUCLEI = flags.DEFINE_string("nuclei", None, "Fluorescence picture.")
_ULTRASOUND = flags.DEFINE_string("ultrasound", None, "Ultrasound picture.")
_POINTS = flags.DEFINE_integer("points_per_side", 16, "Of the grid.")
_IOU = flags.DEFINE_float("pred_iou_thresh", 0.7, "Least predicted IoU.")
_STABILITY = flags.DEFINE_float("stability_score_thresh", 0.8, "Least stability.")
_CROPS = flags.DEFINE_list("crops", ["0", "1"], "Crop layers, one row of the table each.")
_PICTURES = flags.DEFINE_list("pictures", [], "Some of CT, MR, ultrasound, nuclei; all by default.")
_OUTPUT = flags.DEFINE_string("output", None, "Markdown file to write.")

_REFERENCE = "totalsegmentator-2.18.0/tests/reference_files"


@dataclasses.dataclass(frozen=True)
class Row:
    """One picture with one number of crop layers."""

    picture: str
    shape: tuple[int, int]
    crops: int
    theirs: int
    ours: int
    matched: int
    theirs_seconds: float
    ours_seconds: float


def main(argv) -> None:
    del argv
    model = medsam_jax.load_model(_CHECKPOINT.value)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        convert = ["weights_converter.convert", "--input", _CHECKPOINT.value]
        convert += ["--output", str(weights), "--format", "pth"]
        subprocess.run([sys.executable, "-m", *convert], check=True)
        theirs = lite_medsam_as_sam(load_torch_lite_medsam(weights))
    rows = []
    for (name, picture), crops in itertools.product(pictures().items(), map(int, _CROPS.value)):
        rows.append(compare(model, theirs, name, picture, crops))
        print(rows[-1], flush=True)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(markdown(rows), encoding="utf-8")


def compare(model, theirs, name: str, picture: np.ndarray, crops: int) -> Row:
    settings = {
        "points_per_batch": 64,
        "pred_iou_thresh": _IOU.value,
        "stability_score_thresh": _STABILITY.value,
        "crop_n_layers": crops,
        "crop_n_points_downscale_factor": 2,
    }
    predictor = medsam_jax.Predictor(model)

    def ours(points_per_side: int) -> list:
        generator = AutomaticMaskGenerator(predictor, points_per_side, prompts="points", **settings)
        return generator.generate(picture)

    ours(8)  # compiles: batches of 64 and 16 points
    if _POINTS.value**2 % 64 or crops:
        ours(_POINTS.value)
    start = time.perf_counter()
    answers = ours(_POINTS.value)
    ours_seconds = time.perf_counter() - start
    generator = SamAutomaticMaskGenerator(theirs, _POINTS.value, **settings)
    generator.predictor.transform = LiteTransform(256)
    start = time.perf_counter()
    expected = generator.generate(picture)
    theirs_seconds = time.perf_counter() - start
    matched = count_matched(answers, expected, 0.95)
    shape, counts = picture.shape[:2], (len(expected), len(answers), matched)
    return Row(name, shape, crops, *counts, theirs_seconds, ours_seconds)


def pictures() -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] by name."""
    lite, scans = get_recipe("lite"), Path(_SCANS.value)
    found = {"CT": abdominal_ct(scans)[0]}
    brain = read_scan(scans / "pyradiomics_bhklab-3.1.4/data/brain1_image.nrrd")
    tumour = read_mask(scans / "pyradiomics_bhklab-3.1.4/data/brain1_label.nrrd", brain)
    index = int((tumour > 0).sum(axis=(1, 2)).argmax())
    found["MR"] = normalise_intensity(brain.array, "MR", lite)[index]
    for name, path in (("ultrasound", _ULTRASOUND.value), ("nuclei", _NUCLEI.value)):
        if path:
            found[name] = normalise_intensity(read_scan(path).array, None, lite)[0]
    wanted = _PICTURES.value or list(found)
    return {
        name: picture if picture.ndim == 3 else cv2.merge([picture] * 3)
        for name, picture in found.items()
        if name in wanted
    }


def abdominal_ct(scans: Path) -> tuple[np.ndarray, np.ndarray]:
    """A slice of TotalSegmentator's DICOM series and its label map."""
    scan = read_scan(scans / _REFERENCE / "example_ct_dicom")
    labels = read_mask(scans / _REFERENCE / "example_seg_dicom.nii.gz", scan)
    return normalise_intensity(scan.array, "CT", get_recipe("lite"))[14], labels[14]


def markdown(rows: list[Row]) -> str:
    command = " ".join(["python -m tests.parity.automatic_table", *sys.argv[1:]])
    lines = [
        "| picture | pixels | crop layers | theirs | ours | matched | s theirs | s ours | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        height, width = row.shape
        share = row.matched / max(row.theirs, row.ours, 1)
        lines.append(
            f"| {row.picture} | {height} x {width} | {row.crops} | {row.theirs} | {row.ours} | "
            f"{row.matched} ({100 * share:.1f} %) | {row.theirs_seconds:.1f} | "
            f"{row.ours_seconds:.1f} | {row.ours_seconds / row.theirs_seconds:.2f} |"
        )
    return "\n".join([*lines, "", "```", command, "```", ""])


if __name__ == "__main__":
    run(main)
