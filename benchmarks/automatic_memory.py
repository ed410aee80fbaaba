"""Measures the peak memory of automatic masks from a grid of points on an abdominal CT slice.

    python -m benchmarks.automatic_memory --scans demo/scans --points_per_side 128

The peak is the kernel's VmHWM of the whole process, including Python and libraries. Each run
therefore measures one setting. With `--open` every mask passes the filters and none is a duplicate:
the largest number of masks is kept.
"""

import time
from pathlib import Path

from absl import flags

import medsam_jax
from benchmarks.worker import peak_memory
from medsam_jax.cli import run
from medsam_jax.io.scans import read_scan

_CHECKPOINT = flags.DEFINE_string("checkpoint", "lite_medsam", "Name or directory.")
_SCANS = flags.DEFINE_string("scans", "demo/scans", "Folder of the demo's scans.")
_POINTS = flags.DEFINE_integer("points_per_side", 128, "Of the grid.", lower_bound=1)
_OPEN = flags.DEFINE_bool("open", False, "Let every mask pass.")

_SERIES = "totalsegmentator-2.18.0/tests/reference_files/example_ct_dicom"
_SLICE = 14


def main(argv) -> None:
    del argv
    settings = {"pred_iou_thresh": 0, "stability_score_thresh": 0} if _OPEN.value else {}
    generator = medsam_jax.AutomaticMaskGenerator(
        medsam_jax.load_model(_CHECKPOINT.value),
        _POINTS.value,
        prompts="points",
        output_mode="coco_rle",
        box_nms_thresh=1 if _OPEN.value else 0.7,
        **settings,
    )
    image = read_scan(Path(_SCANS.value) / _SERIES).array[_SLICE]
    before, start = peak_memory(), time.perf_counter()
    masks = generator.generate(image, modality="CT")
    seconds = time.perf_counter() - start
    print(
        f"{_POINTS.value} x {_POINTS.value} points: {len(masks)} masks in {seconds:.0f} s; peak "
        f"{peak_memory() / 1e9:.2f} GB, {before / 1e9:.2f} GB before"
    )


if __name__ == "__main__":
    run(main)
