"""Device side of automatic mask generation, in fixed shapes: filters, boxes, suppression.

segment_anything (utils/amg.py) filters by boolean indexing: every step has another shape, and all
masks of a batch are enlarged together. Here a batch keeps its shape: masks that pass are moved to
the front and counted, and a loop enlarges a few of them at a time, so memory does not grow with the
batch times the image. Results equal segment_anything's at the image's own size.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from medsam_jax.data.recipes import Preprocessing, get_recipe
from medsam_jax.inference.prompts import bucket

_PIXELS_AT_ONCE = 1 << 22  # of enlarged masks in one turn of the loop, 16 MB of logits
_EDGE_TOLERANCE = 20.0  # pixels, segment_anything's


class Enlargement(NamedTuple):
    """Bilinear resize of low-resolution logits to the pixels of a crop: one matrix for each axis.

    Sizes are rounded up, so that few are compiled; rows and columns beyond the crop are zero.
    """

    rows: Float[np.ndarray, "height m"]
    columns: Float[np.ndarray, "width m"]
    shape: Int[np.ndarray, " 2"]  # (H, W), pixels of the crop


FILTERS = ("predicted IoU", "stability", "empty", "at a crop's edge")


class Thresholds(NamedTuple):
    """Least values of a mask; 0 turns off either of the first two, as in segment_anything."""

    predicted_iou: float
    stability: float
    stability_offset: float  # logits
    mask: float  # logits


class Filtered(NamedTuple):
    """Masks that passed, the first `count` of each array, in the order of the prompts."""

    count: Int[Array, ""]
    prompts: Int[Array, " k"]  # which of the batch
    scores: Float[Array, " k"]  # predicted IoU
    stability: Float[Array, " k"]
    boxes: Int[Array, "k 4"]  # x0, y0, x1, y1, pixels of the whole image
    packed: UInt8[Array, "k width height//8"]  # of the crop, columns first, 8 pixels a byte
    dropped: Int[Array, " 4"]  # of the first filter that each mask failed, by `FILTERS`


def enlargement(
    mask_side: int,
    valid_shape: Sequence[int],
    crop_shape: Sequence[int],
    preprocessing: Preprocessing,
) -> Enlargement:
    """Returns the steps of `restore_masks` as matrices, for logits of `mask_side` ** 2.

    `valid_shape` (h, w) is that of the crop on the stored grid, `crop_shape` (H, W) in pixels.
    """
    recipe = get_recipe(preprocessing.recipe)
    stored = recipe.size if recipe.geometry == "pad" else None
    rows, columns = (
        _axis(mask_side, stored, int(valid), int(full))
        for valid, full in zip(valid_shape, crop_shape, strict=True)
    )
    return Enlargement(rows, columns, np.array(crop_shape, np.int32))


@functools.lru_cache(maxsize=16)
def _axis(mask_side: int, stored: int | None, valid: int, full: int) -> np.ndarray:
    """[full rounded up, mask_side]: to the stored grid, cut to what is valid, to the full size."""
    if stored is None:
        matrix = _bilinear(mask_side, full)
    else:
        matrix = _bilinear(valid, full) @ _bilinear(mask_side, stored)[:valid]
    return np.pad(matrix, ((0, _rounded_up(full) - full), (0, 0))).astype(np.float32)


def _bilinear(size_in: int, size_out: int) -> np.ndarray:
    """`F.interpolate(mode="bilinear", align_corners=False)` along one axis, as a matrix."""
    position = np.maximum((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0)
    low = np.minimum(position.astype(int), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(size_out), high), position - low)
    return matrix


def _rounded_up(size: int) -> int:
    """Rounds up by at most an eighth or 63 pixels, so similar sizes share a compiled program."""
    step = max(64, 1 << max(math.ceil(math.log2(size)) - 3, 0))
    return -(-size // step) * step


@functools.partial(jax.jit, static_argnames="upsample")
def filter_masks(
    logits: Float[Array, "p c m m"],
    scores: Float[Array, "p c"],
    valid: Bool[Array, " p"],
    to_crop: Enlargement,
    crop_box: Int[Array, " 4"],
    image_shape: Int[Array, " 2"],
    thresholds: Thresholds,
    upsample: str,
) -> Filtered:
    """Finds the masks of a batch of prompts that pass every filter of segment_anything.

    Args:
      logits, scores: the decoder's answers.
      valid: prompts that are not padding.
      to_crop: from `enlargement`, for this crop.
      crop_box: x0, y0, x1, y1 of the crop in the image of `image_shape` (H, W).
      upsample: "logits" or "probabilities", the contract's.

    Returns:
      Masks with a predicted IoU above its threshold and a stability of at least its own, that are
      not empty, and whose box does not end within 20 pixels of a crop's edge inside the image.
    """
    total = scores.size
    flat = logits.reshape(total, *logits.shape[2:])
    scores = scores.reshape(-1)
    wanted = (scores > thresholds.predicted_iou) | (thresholds.predicted_iou <= 0)
    wanted &= jnp.repeat(valid, total // valid.size)
    order = jnp.argsort(~wanted, stable=True)
    count = wanted.sum()
    low_iou = valid.sum() * (total // valid.size) - count
    width, height = to_crop.columns.shape[0], to_crop.rows.shape[0]
    chunk = max(1, min(_PIXELS_AT_ONCE // (width * height), total))
    order = jnp.pad(order, (0, chunk))  # the last turn may reach beyond

    def turn(state: tuple[Array, Filtered]) -> tuple[Array, Filtered]:
        start, found = state
        index = jax.lax.dynamic_slice(order, (start,), (chunk,))
        stability, boxes, packed, occupied = _measure(flat[index], to_crop, thresholds, upsample)
        boxes = boxes + jnp.tile(crop_box[:2], 2)
        keep = start + jnp.arange(chunk) < count
        dropped = [jnp.zeros((), count.dtype)]  # predicted IoU: counted before
        for passes in (
            (stability >= thresholds.stability) | (thresholds.stability <= 0),
            occupied,
            ~_ends_at_crop_edge(boxes, crop_box, image_shape),
        ):
            dropped.append((keep & ~passes).sum())
            keep &= passes
        place = jnp.where(keep, found.count + jnp.cumsum(keep) - 1, total)  # total: dropped
        prompts = index // (total // valid.size)
        values = (prompts, scores[index], stability, boxes, packed)
        arrays = (
            array.at[place].set(value, mode="drop")
            for array, value in zip(found[1:-1], values, strict=True)
        )
        all_dropped = found.dropped + jnp.stack(dropped).astype(found.dropped.dtype)
        return start + chunk, Filtered(found.count + keep.sum(), *arrays, all_dropped)

    empty = Filtered(
        count=jnp.zeros((), count.dtype),
        prompts=jnp.zeros(total, order.dtype),
        scores=jnp.zeros(total, scores.dtype),
        stability=jnp.zeros(total),
        boxes=jnp.zeros((total, 4), jnp.int32),
        packed=jnp.zeros((total, width, height // 8), jnp.uint8),
        dropped=jnp.zeros(len(FILTERS), count.dtype).at[0].set(low_iou),
    )
    start = jnp.zeros((), count.dtype)
    return jax.lax.while_loop(lambda state: state[0] < count, turn, (start, empty))[1]


@jax.jit
def low_res_boxes(
    logits: Float[Array, "n m m"], mask_threshold: float | Float[Array, ""]
) -> Int[Array, "n 4"]:
    """x0, y0, x1, y1 of masks in low-resolution pixels, x1 and y1 one beyond the last."""
    mask = logits > mask_threshold
    boxes = _boxes(mask) + jnp.array([0, 0, 1, 1])
    return jnp.where(mask.any(axis=(1, 2))[:, None], boxes, 0)


def _measure(maps, to_crop: Enlargement, thresholds: Thresholds, upsample: str):
    """Stability, box in the crop, packed mask and whether there is one, of maps [N, m, m]."""
    levels = thresholds.mask + jnp.array([-1.0, 0.0, 1.0]) * thresholds.stability_offset
    if upsample == "probabilities":
        maps, levels = jax.nn.sigmoid(maps), jax.nn.sigmoid(levels)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    maps = jnp.einsum("nyx,Yy->nYx", maps, to_crop.rows, **exact)
    maps = jnp.einsum("nYx,Xx->nXY", maps, to_crop.columns, **exact)  # [N, W, H]
    columns = jnp.arange(maps.shape[1])
    rows = jnp.arange(maps.shape[2])
    inside = (columns[:, None] < to_crop.shape[1]) & (rows < to_crop.shape[0])
    larger, mask, smaller = ((maps > level) & inside for level in levels)
    area = larger.sum(axis=(1, 2))
    stability = jnp.where(area > 0, smaller.sum(axis=(1, 2)) / jnp.maximum(area, 1), 0.0)
    boxes = _boxes(mask.transpose(0, 2, 1))
    return stability, boxes, jnp.packbits(mask, axis=2), mask.any(axis=(1, 2))


def _boxes(masks: Bool[Array, "n height width"]) -> Int[Array, "n 4"]:
    """x0, y0, x1, y1 of the extreme pixels."""
    lines = masks.any(axis=1), masks.any(axis=2)  # columns, rows
    first = [jnp.argmax(line, axis=1) for line in lines]
    last = [line.shape[1] - 1 - jnp.argmax(line[:, ::-1], axis=1) for line in lines]
    return jnp.stack(first + last, axis=1)


def _ends_at_crop_edge(boxes, crop_box, image_shape) -> Bool[Array, " n"]:
    image_box = jnp.concatenate([jnp.zeros(2, image_shape.dtype), image_shape[::-1]])
    near_crop = jnp.abs(boxes - crop_box) <= _EDGE_TOLERANCE
    near_image = jnp.abs(boxes - image_box) <= _EDGE_TOLERANCE
    return (near_crop & ~near_image).any(axis=1)


def suppress(
    boxes: Num[np.ndarray, "n 4"], scores: Float[np.ndarray, " n"], iou_threshold: float
) -> list[int]:
    """Greedy non-maximum suppression: indices kept, best score first (torchvision's `nms`)."""
    size = max(256, bucket(len(boxes)))
    more = size - len(boxes)
    padded = np.pad(boxes.astype(np.float32), ((0, more), (0, 0)))
    ranks = np.pad(scores.astype(np.float32), (0, more))
    valid = np.arange(size) < len(boxes)
    kept, count = jax.device_get(_suppress(padded, ranks, valid, iou_threshold))
    return kept[:count].tolist()


@jax.jit
def _suppress(boxes, scores, valid, iou_threshold) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Keeps the best remaining box in each turn: as many turns as boxes are kept."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    def turn(state):
        kept, count, left = state
        best = jnp.argmax(jnp.where(left, scores, -jnp.inf))
        low = jnp.maximum(boxes[:, :2], boxes[best, :2])
        high = jnp.minimum(boxes[:, 2:], boxes[best, 2:])
        overlap = jnp.clip(high - low, 0).prod(axis=1)
        suppressed = overlap / (area + area[best] - overlap) > iou_threshold  # NaN: kept
        left &= ~suppressed & (jnp.arange(left.size) != best)
        return kept.at[count].set(best), count + 1, left

    start = (jnp.zeros(scores.size, jnp.int32), 0, valid)
    kept, count, _ = jax.lax.while_loop(lambda state: state[2].any(), turn, start)
    return kept, count
