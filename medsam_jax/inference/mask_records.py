"""What automatic mask generation does on the host: run lengths, clean-up, crops, grids of prompts.

Definitions of segment_anything/utils/amg.py, written for NumPy; COCO's compressed run lengths are
made here, without pycocotools.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8


def encode_rle(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """COCO's uncompressed run lengths, down the columns, beginning with background."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    counts = runs.tolist() if not flat[0] else [0, *runs.tolist()]
    return {"size": list(mask.shape), "counts": counts}


def encode_packed(
    packed: UInt8[np.ndarray, "w bytes"],
    box: Sequence[int] | Int[np.ndarray, " 4"],
    crop_box: Sequence[int],
    image_shape: tuple[int, int],
) -> Int[np.ndarray, " runs"]:
    """Counts as `encode_rle`'s, of a mask of a crop with a column's pixels packed eight to a byte.

    Args:
      packed: columns of the crop, or more; what lies beyond the crop is not read.
      box: x0, y0, x1, y1 of the mask in the image; only its columns are unpacked.
      crop_box: of the crop in the image.
      image_shape: (H, W) of the image.
    """
    height, width = image_shape
    left, top, _, bottom = crop_box
    first, last = int(box[0]), int(box[2])
    columns = np.zeros((last - first + 1, height), np.int8)
    inside = packed[first - left : last - left + 1]
    columns[:, top:bottom] = np.unpackbits(inside, axis=1, count=bottom - top)
    edges = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + first * height
    runs = np.diff(edges, prepend=0, append=height * width)
    return (runs[:-1] if runs[-1] == 0 else runs).astype(np.int32)


def decode_rle(rle: dict[str, Any]) -> Bool[np.ndarray, "h w"]:
    """The mask of uncompressed run lengths."""
    height, width = rle["size"]
    values = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(values, rle["counts"]).reshape((height, width), order="F")


def compress_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """COCO's compressed form: counts as differences from the one before last, in base 32."""
    counts, text = rle["counts"], []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text.append(chr(48 + digit + (32 if more else 0)))
    return {"size": rle["size"], "counts": "".join(text)}


def mask_box(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the extreme pixels; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def remove_small_regions(
    mask: Bool[np.ndarray, "h w"], min_area: int
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Fills holes and drops islands below `min_area` pixels (8-connected); whether it changed.

    The largest island stays, however small.
    """
    filled = mask | _small(~mask, min_area)[0]
    islands, largest = _small(filled, min_area)
    result = filled & ~islands
    if filled.any() and not result.any():
        result = largest
    return result, bool((result != mask).any())


def _small(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, np.ndarray]:
    """Components below `min_area`, and the largest component."""
    import cv2

    _, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), None, 8)
    sizes = stats[:, cv2.CC_STAT_AREA].copy()
    sizes[0] = 0  # the background
    small = sizes < min_area
    small[0] = False
    return small[components], mask & (components == sizes.argmax())


def crop_boxes(
    image_shape: tuple[int, int], layers: int, overlap_ratio: float
) -> list[tuple[tuple[int, int, int, int], int]]:
    """The image (layer 0) and overlapping crops of it, 4 ** i of layer i: x0, y0, x1, y1; layer."""
    height, width = image_shape
    boxes = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / per_side))
        crop_w, crop_h = (
            math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (width, height)
        )
        for i, j in itertools.product(range(per_side), repeat=2):
            x0, y0 = (crop_w - overlap) * i, (crop_h - overlap) * j
            boxes.append(((x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height)), layer))
    return boxes


def point_grid(per_side: int) -> Float[np.ndarray, "n 2"]:
    """The centres of `per_side` ** 2 cells of the unit square, row by row."""
    centres = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(centres, centres)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def box_grid(shape: tuple[int, int], sides: tuple[float, ...]) -> Float[np.ndarray, "n 4"]:
    """Square boxes in an image of (H, W), evenly spread, neighbours half a box apart or less.

    Args:
      sides: of the boxes, as parts of the image's shorter side.
    """
    height, width = shape
    boxes = []
    for part in sides:
        side = part * min(height, width)
        starts = [
            np.linspace(0, length - side, math.ceil(2 * length / side) - 1)
            for length in (width, height)
        ]
        x, y = (grid.ravel() for grid in np.meshgrid(*starts))
        boxes.append(np.stack([x, y, x + side - 1, y + side - 1], axis=-1))
    return np.concatenate(boxes)
