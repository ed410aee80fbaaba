"""Counts the labelled objects that automatic masks find, from points and from boxes.

    python scripts/automatic_masks_table.py --scans demo/scans --nuclei stardist/data/images \\
        --output docs/images

Prints a table; `--output` also writes pictures. An object is found if a mask overlaps it by IoU
0.5, or 0.75. The abdominal CT is a slice of the demo's scans; a model labelled its organs, of
which those of at least 50 pixels count. The nuclei are `img2d.tif` and `mask2d.tif` of the package
stardist 0.9.2, labelled by people. The row "exact boxes" prompts with the box of every object, as
an upper bound.
"""

import dataclasses
import time
from pathlib import Path

import cv2
import numpy as np
from absl import flags
from PIL import Image

import medsam_jax
from medsam_jax.cli import run
from medsam_jax.data.preprocess import normalise_intensity
from medsam_jax.data.prompts import box_from_mask
from medsam_jax.data.recipes import get_recipe
from medsam_jax.drawing import PREDICTION, TRUTH
from medsam_jax.io.scans import read_mask, read_scan

_CHECKPOINT = flags.DEFINE_string("checkpoint", "lite_medsam", "Name or directory.")
_SCANS = flags.DEFINE_string("scans", "demo/scans", "Folder of the demo's scans.")
_NUCLEI = flags.DEFINE_string("nuclei", None, "Folder with img2d.tif and mask2d.tif.")
_MODES = flags.DEFINE_list(
    "modes", ["exact boxes", "points", "boxes", "medical"], "Rows of the table."
)
_POINTS = flags.DEFINE_integer("points_per_side", 16, "Of the grid of points.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the pictures; none by default.")

_REFERENCE = "totalsegmentator-2.18.0/tests/reference_files"
_ABDOMEN_SLICE, _LEAST_PIXELS = 14, 50
_PANEL = 560  # pixels across
_GREY_BITS = 3  # low bits that are dropped
_FOUND, _OTHER = 32, 33  # palette indices, after the greys
_COLOURS = [*TRUTH, *PREDICTION]


@dataclasses.dataclass(frozen=True)
class Picture:
    """Picture as uint8 [H, W] with the masks [N, H, W] of its labelled objects."""

    name: str
    image: np.ndarray
    objects: np.ndarray


def main(argv) -> None:
    del argv
    predictor = medsam_jax.Predictor(medsam_jax.load_model(_CHECKPOINT.value))
    print("| picture | mode | masks offered | found at 0.5 | found at 0.75 | objects | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for picture in pictures():
        for mode in _MODES.value:
            start = time.perf_counter()
            masks = offered(predictor, picture, mode)
            seconds = time.perf_counter() - start
            iou = overlaps(masks, picture.objects)
            best = iou.max(axis=0, initial=0)
            print(
                f"| {picture.name} | {mode} | {len(masks)} | {(best >= 0.5).sum()} | "
                f"{(best >= 0.75).sum()} | {len(best)} | {seconds:.0f} |",
                flush=True,
            )
            if _OUTPUT.value:
                name = f"automatic_{picture.name}_{mode}.png".lower().replace(" ", "_")
                draw(picture, masks, iou, Path(_OUTPUT.value) / name)


def pictures() -> list[Picture]:
    lite, folder = get_recipe("lite"), Path(_SCANS.value) / _REFERENCE
    scan = read_scan(folder / "example_ct_dicom")
    labels = read_mask(folder / "example_seg_dicom.nii.gz", scan)[_ABDOMEN_SLICE]
    image = normalise_intensity(scan.array, "CT", lite)[_ABDOMEN_SLICE]
    found = [Picture("CT", image, objects_of(labels, _LEAST_PIXELS))]
    if _NUCLEI.value:
        scan = read_scan(Path(_NUCLEI.value) / "img2d.tif")
        labels = read_mask(Path(_NUCLEI.value) / "mask2d.tif", scan)[0]
        image = normalise_intensity(scan.array, None, lite)[0]
        found.append(Picture("nuclei", image, objects_of(labels, 1)))
    return found


def objects_of(labels: np.ndarray, least_pixels: int) -> np.ndarray:
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    return np.stack([labels == value for value in values[counts >= least_pixels]])


def offered(predictor: medsam_jax.Predictor, picture: Picture, mode: str) -> np.ndarray:
    """Returns the masks [M, H, W] that one prompt mode yields."""
    if mode == "exact boxes":
        predictor.set_normalised([picture.image])
        boxes = np.stack([box_from_mask(mask) for mask in picture.objects])
        return predictor.predict(box=boxes, multimask_output=False)[0][:, 0]
    if mode == "medical":
        generator = medsam_jax.AutomaticMaskGenerator.medical(predictor)
    else:
        generator = medsam_jax.AutomaticMaskGenerator(predictor, _POINTS.value, prompts=mode)
    answers = generator.generate(picture.image)
    shape = (len(answers), *picture.image.shape)
    return np.array([a["segmentation"] for a in answers], bool).reshape(shape)


def overlaps(masks: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Returns the IoU [M, N] of every mask with every object."""
    pixels = objects[0].size
    a, b = (x.reshape(len(x), pixels).astype(np.float32) for x in (masks, objects))
    both = a @ b.T
    union = a.sum(axis=1)[:, None] + b.sum(axis=1) - both
    return both / np.maximum(union, 1)


def draw(picture: Picture, masks: np.ndarray, iou: np.ndarray, path: Path) -> None:
    """Draws outlines over the picture: labelled objects on the left, masks on the right.

    Objects and masks that match at IoU 0.5 are green; the others are orange.
    """
    height, width = picture.image.shape
    size = (_PANEL, round(_PANEL * height / width))
    # Few grey levels make noise compressible. The palette keeps the colours of the outlines exact.
    greys = cv2.resize(picture.image, size, interpolation=cv2.INTER_AREA) >> _GREY_BITS
    panels = []
    for shown, best in ((picture.objects, iou.max(axis=0, initial=0)), (masks, iou.max(axis=1))):
        panel = greys.copy()
        for mask, is_found in sorted(zip(shown, best >= 0.5, strict=True), key=lambda x: x[1]):
            larger = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            contours, _ = cv2.findContours(larger, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(panel, contours, -1, _FOUND if is_found else _OTHER, 1)
        panels.append(panel)
    drawn = Image.fromarray(cv2.hconcat(panels), "P")
    palette = [level << _GREY_BITS for level in range(_FOUND) for _ in range(3)]
    drawn.putpalette([*palette, *_COLOURS])
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(path, optimize=True)


if __name__ == "__main__":
    run(main)
