"""What automatic mask generation does with masks: run lengths, boxes, stability, suppression.

Definitions of segment_anything/utils/amg.py, written for NumPy; COCO's compressed run lengths are
made here, without pycocotools.
"""

import itertools
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


def encode_rle(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """COCO's uncompressed run lengths, down the columns, beginning with background."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    counts = runs.tolist() if not flat[0] else [0, *runs.tolist()]
    return {"size": list(mask.shape), "counts": counts}


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


def stability_score(logits: Float[np.ndarray, "h w"], threshold: float, offset: float) -> float:
    """IoU of the masks at `threshold` + and - `offset`; 0 where the larger one is empty."""
    larger = np.count_nonzero(logits > threshold - offset)
    return np.count_nonzero(logits > threshold + offset) / larger if larger else 0.0


def mask_box(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the extreme pixels; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def suppress(
    boxes: Float[np.ndarray, "n 4"], scores: Float[np.ndarray, " n"], iou_threshold: float
) -> list[int]:
    """Greedy non-maximum suppression: indices kept, best score first (torchvision's `nms`)."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-np.asarray(scores), kind="stable")
    kept = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        overlap = np.clip(high - low, 0, None).prod(axis=1)
        union = area[best] + area[order] - overlap
        order = order[overlap <= iou_threshold * union]
    return kept


def touches_crop_edge(box, crop_box, image_shape: tuple[int, int], atol: float = 20.0) -> bool:
    """Whether a box ends within `atol` pixels of its crop's edge, where the image goes on."""
    height, width = image_shape
    near_crop = np.abs(np.subtract(box, crop_box)) <= atol
    near_image = np.abs(np.subtract(box, (0, 0, width, height))) <= atol
    return bool((near_crop & ~near_image).any())


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
