"""Host side of automatic mask generation: packed crops, clean-up, crops and grids of prompts.

Definitions of segment_anything/utils/amg.py, written for NumPy.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from medsam_jax.data.prompts import box_from_mask
from medsam_jax.data.run_lengths import runs_between
from medsam_jax.errors import UserError


def encode_packed(
    packed: UInt8[np.ndarray, "w bytes"],
    box: Sequence[int] | Int[np.ndarray, " 4"],
    crop_box: Sequence[int],
    image_shape: tuple[int, int],
) -> Int[np.ndarray, " runs"]:
    """Counts as `encode_rle`'s, of a mask of a crop with a column's pixels packed eight to a byte.

    Args:
      packed: columns of the crop, or more; what lies beyond the crop is not read.
      box, crop_box: x0, y0, x1, y1 of the mask, whose columns alone are unpacked, and of the crop.
    """
    height, width = image_shape
    left, top, _, bottom = crop_box
    first, last = int(box[0]), int(box[2])
    columns = np.zeros((last - first + 1, height), np.int8)
    inside = packed[first - left : last - left + 1]
    columns[:, top:bottom] = np.unpackbits(inside, axis=1, count=bottom - top)
    edges = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + first * height
    return runs_between(edges, height * width).astype(np.int32)


def mask_box(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the extreme pixels; zeros for an empty mask."""
    return tuple(box_from_mask(mask).astype(int).tolist()) if mask.any() else (0, 0, 0, 0)


def coco_box(box: Sequence[int]) -> list[int]:
    """COCO's x, y, width, height of a box between extreme pixels: sides are numbers of pixels.

    segment_anything's width and height are one less.
    """
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0 + 1, y1 - y0 + 1]


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
    sizes = stats[:, cv2.CC_STAT_AREA]
    sizes[0] = 0  # the background
    return mask & (sizes[components] < min_area), mask & (components == sizes.argmax())


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


def unit_grid(layer: int, grid: Any) -> np.ndarray:
    """Returns the generator's `point_grids[layer]`, checked to be [N, 2] in the unit square."""
    points = np.asarray(grid, float)
    if points.ndim != 2 or points.shape[1] != 2 or points.size == 0:
        raise UserError(f"point_grids[{layer}]: shape {points.shape}; give [N, 2]")
    if not ((points >= 0) & (points <= 1)).all():
        raise UserError(
            f"point_grids[{layer}]: from {points.min():g} to {points.max():g}; give x and y as "
            "parts of width and height, 0 to 1"
        )
    return points


def box_grid(shape: tuple[int, int], sides: Sequence[float]) -> Float[np.ndarray, "n 4"]:
    """Square boxes in an image of (H, W), evenly spread, neighbours half a box apart or less.

    Their `sides` are parts of the image's shorter side.
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
