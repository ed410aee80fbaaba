"""Prompts as users give them, checked, and packed into the padded arrays that the model takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from medsam_jax.data.prompts import PADDING_LABEL
from medsam_jax.errors import UserError

# Of a prompt, as arguments of `Predictor.predict`.
PARTS = ("point_coords", "point_labels", "box", "mask_input")


class Prompts(NamedTuple):
    """Prompts of one image: P of them, each with the parts that are not None."""

    coords: np.ndarray | None = None  # float32 [P, N, 2], xy
    labels: np.ndarray | None = None  # int32 [P, N], 1 foreground, 0 background
    boxes: np.ndarray | None = None  # float32 [P, 4]
    masks: np.ndarray | None = None  # float32 [P, m, m]
    single: bool = False  # given without the leading P: the answer comes without it too

    @property
    def count(self) -> int:
        """P."""
        return len(next(p for p in (self.coords, self.boxes, self.masks) if p is not None))

    def part(self, chosen: slice) -> "Prompts":
        """Some of the P prompts."""
        parts = (self.coords, self.labels, self.boxes, self.masks)
        return Prompts(*(None if p is None else p[chosen] for p in parts), single=self.single)


def read_prompts(
    image_shape: tuple[int, int],
    mask_side: int,
    point_coords: Any = None,
    point_labels: Any = None,
    box: Any = None,
    mask_input: Any = None,
) -> Prompts:
    """Checks the arguments of `Predictor.predict` and gives them a leading axis of prompts.

    Args:
      image_shape: (H, W) of the image, for prompts that miss it.
      mask_side: m, side of the model's low-resolution masks.
      mask_input: [m, m] or [1, m, m] of one prompt, or [P, 1, m, m] ([P, m, m] for P > 1).

    Raises:
      UserError: nothing given, points without labels, other labels than 0 and 1, a box that is
        inverted or misses the image, a mask of the wrong size, parts that disagree on P.
    """
    coords, labels = _read_points(point_coords, point_labels, image_shape)
    boxes = None if box is None else _read_boxes(box, image_shape)
    masks = None if mask_input is None else _read_masks(mask_input, mask_side)
    counts = {
        name: len(part)
        for name, part in (("point_coords", coords), ("box", boxes), ("mask_input", masks))
        if part is not None
    }
    if not counts:
        raise UserError("prompt: nothing given; give point_coords, box or mask_input")
    if len(set(counts.values())) > 1:
        raise UserError(f"prompt: numbers of prompts differ, {counts}; give as many of each")
    single = all(
        given is None or np.ndim(given) <= axes
        for given, axes in ((point_coords, 2), (box, 1), (mask_input, 3))
    )
    return Prompts(coords, labels, boxes, masks, single and set(counts.values()) == {1})


def _read_points(coords, labels, image_shape) -> tuple[np.ndarray | None, np.ndarray | None]:
    if coords is None and labels is None:
        return None, None
    if coords is None or labels is None:
        lacking = "point_coords" if coords is None else "point_labels"
        raise UserError(f"{lacking}: missing; points need both point_coords and point_labels")
    coords = _numbers("point_coords", coords)
    labels = _numbers("point_labels", labels)
    if coords.ndim not in (2, 3) or coords.shape[-1] != 2 or coords.shape[:-1] != labels.shape:
        raise UserError(
            f"point_coords: shape {coords.shape} with point_labels of {labels.shape}; give [N, 2] "
            "and [N], or [P, N, 2] and [P, N]"
        )
    if coords.size == 0:
        raise UserError("point_coords: empty; leave them out, or give at least one point")
    if not np.isin(labels, (0, 1)).all():
        bad = labels[~np.isin(labels, (0, 1))].flat[0]
        raise UserError(f"point_labels: {bad:g}; use 1 for foreground and 0 for background")
    height, width = image_shape
    outside = (coords < 0).any(axis=-1) | (coords >= (width, height)).any(axis=-1)
    if outside.any():
        x, y = coords[outside][0]
        raise UserError(f"point_coords: ({x:g}, {y:g}) is outside the image of {width} x {height}")
    points = coords.shape[-2]
    return coords.reshape(-1, points, 2), labels.astype(np.int32).reshape(-1, points)


def _read_boxes(box, image_shape) -> np.ndarray:
    boxes = _numbers("box", box)
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4 or boxes.size == 0:
        raise UserError(f"box: shape {boxes.shape}; give [4] or [P, 4] as x0, y0, x1, y1")
    boxes = boxes.reshape(-1, 4)
    height, width = image_shape
    for x0, y0, x1, y1 in boxes:
        text = f"box: ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x1 < x0 or y1 < y0:
            raise UserError(f"{text} is inverted; give x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
        if x1 < 0 or y1 < 0 or x0 >= width or y0 >= height:
            raise UserError(f"{text} is outside the image of {width} x {height}")
    return boxes


def _read_masks(mask_input, side: int) -> np.ndarray:
    masks = _numbers("mask_input", mask_input)
    if masks.shape[-2:] != (side, side) or masks.ndim > 4 or masks.size == 0:
        raise UserError(
            f"mask_input: shape {masks.shape}; give low-resolution logits of an earlier answer, "
            f"[{side}, {side}] for each prompt"
        )
    if masks.ndim == 4 and masks.shape[1] != 1:
        raise UserError(f"mask_input: {masks.shape[1]} masks for each prompt; choose one of them")
    return masks.reshape(-1, side, side)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"{name}: is not an array of numbers") from None
    if not np.isfinite(array).all():
        raise UserError(f"{name}: contains NaN or infinity")
    return array


def bucket(count: int) -> int:
    """The next power of two, so that few shapes are ever compiled."""
    return 1 << max(count - 1, 0).bit_length()


def pack(prompts: Sequence[Prompts], count: int | None = None) -> dict[str, Any]:
    """Pads the prompts of B images to common sizes; keyword arguments of `Sam.decode`.

    Coordinates must be in pixels of the encoder input already. Kinds that no image has are left
    out; where some images lack a kind, `points` has padding labels there, which the decoder leaves
    out of its attention, and `boxes_valid` and `masks_valid` are False.

    Args:
      count: number of prompts to pad to, by default the next power of two.
    """
    size = count or bucket(max(p.count for p in prompts))

    def pad(parts, shape, fill=0, dtype=np.float32):
        padded = np.full((len(parts), size, *shape), fill, dtype)
        for place, part in zip(padded, parts, strict=True):
            if part is not None:
                place[tuple(map(slice, part.shape))] = part
        return padded

    packed: dict[str, Any] = {}
    coords, labels, *kinds = ([getattr(p, name) for p in prompts] for name in Prompts._fields[:4])
    shapes = [part.shape for part in coords if part is not None]
    if shapes:
        points = bucket(max(shape[1] for shape in shapes))
        packed["points"] = pad(coords, (points, 2)), pad(labels, (points,), PADDING_LABEL, np.int32)
    for name, parts in zip(("boxes", "masks"), kinds, strict=True):
        given = [part is not None for part in parts]
        if any(given):
            packed[name] = pad(parts, parts[given.index(True)].shape[1:])
            if not all(given):
                packed[f"{name}_valid"] = np.repeat(given, size).reshape(-1, size)
    return packed
