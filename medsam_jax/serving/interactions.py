"""Prompts of the protocol, in voxels of a volume, as prompts on one slice of one plane.

A plane is named by the array axis that it is cut across. Its rows and columns are the other two
axes in their order, and x, y are columns and rows, as in `VolumePredictor`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from medsam_jax.data.prompts import box_from_mask
from medsam_jax.errors import UserError

Shape = tuple[int, int, int]

_POINTS_OF_A_STROKE = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Interaction:
    """A prompt on one slice."""

    axis: int
    index: int  # of the slice
    include: bool
    box: tuple[float, ...] | None = None  # x0, y0, x1, y1; both edges belong to the box
    points: tuple[tuple[float, float], ...] = ()  # x, y
    # Pixels that the answer has, or with `include` False has not: bool [H, W] of the slice.
    paint: np.ndarray | None = None


def read_box(coords: Any, include: bool, shape: Shape, preferred: int) -> Interaction:
    """Returns the prompt of a box [[a, b], ...] in voxels, half-open; what is outside is cut off.

    Raises UserError for a box that is no such thing, has no flat side, or misses the volume.
    """
    ranges = _ranges("bbox_coords", coords, shape)
    axis = _flat_axis([high - low for low, high in ranges], preferred)
    if axis is None:
        raise UserError(f"bbox_coords: {coords}; one axis of a 2D box has length 1")
    (x0, x1), (y0, y1) = (ranges[other] for other in reversed(_others(axis)))
    paint = None
    if not include:
        paint = np.zeros([shape[other] for other in _others(axis)], bool)
        paint[y0:y1, x0:x1] = True
    box = (float(x0), float(y0), float(x1 - 1), float(y1 - 1)) if include else None
    return Interaction(axis, ranges[axis][0], include, box, (), paint)


def read_point(coords: Any, include: bool, shape: Shape, axis: int) -> Interaction:
    """Returns the prompt of a point in voxels, on the slice across `axis`.

    Raises UserError for a point outside the volume.
    """
    point = _numbers("coordinates", coords, (3,))
    if any(not -0.5 <= value < side - 0.5 + 1e-6 for value, side in zip(point, shape, strict=True)):
        raise UserError(f"coordinates: {coords}; the volume has {list(shape)} voxels")
    y, x = (float(np.clip(point[other], 0, shape[other] - 1)) for other in _others(axis))
    index = int(np.clip(round(point[axis]), 0, shape[axis] - 1))
    return Interaction(axis, index, include, points=((x, y),))


def read_stroke(
    drawn: np.ndarray, place: Any, include: bool, shape: Shape, preferred: int, is_lasso: bool
) -> Interaction:
    """Returns the prompt of a scribble or lasso: its box, some of its points, its pixels.

    A scribble's pixels lie in the object. A lasso is drawn around it, so with `include` its box
    counts alone.

    Args:
      drawn: nonzero where drawn, of the whole volume or of its part `place`.
      place: [[a, b], ...] in voxels, or None.

    Raises:
      UserError: nothing is drawn, it is in no single slice, or `drawn` and `place` disagree.
    """
    if drawn.ndim == 4 and len(drawn) == 1:
        drawn = drawn[0]
    corner = [0, 0, 0]
    if place is not None:
        corner = _numbers("interaction_bbox", place, (3, 2))[:, 0].round().astype(int).tolist()
    if drawn.ndim != 3 or (place is None and drawn.shape != shape):
        raise UserError(f"drawn: shape {drawn.shape}; the volume has {list(shape)} voxels")
    voxels = np.argwhere(drawn) + corner
    voxels = voxels[((voxels >= 0) & (voxels < shape)).all(axis=1)]
    if not len(voxels):
        raise UserError("drawn: no voxel of the volume; draw inside it")
    axis = _flat_axis((np.ptp(voxels, axis=0) + 1).tolist(), preferred)
    if axis is None:
        raise UserError("drawn: lies in several slices of every plane; draw in one slice")
    pixels = np.zeros([shape[other] for other in _others(axis)], bool)
    rows, columns = voxels[:, _others(axis)].T
    pixels[rows, columns] = True
    box = tuple(map(float, box_from_mask(pixels))) if include else None
    spread = np.linspace(0, len(rows) - 1, min(len(rows), _POINTS_OF_A_STROKE)).round().astype(int)
    points = () if is_lasso else tuple((float(columns[i]), float(rows[i])) for i in spread)
    paint = None if include and is_lasso else pixels
    return Interaction(axis, int(voxels[0, axis]), include, box, points, paint)


def with_rest(given: Interaction, mask: np.ndarray) -> Interaction:
    """Returns a prompt that leaves something out, with the box of what stays of `mask`.

    A slice that had no prompt of its own is thereby prompted, and its neighbours follow it.
    """
    plane = np.moveaxis(mask, given.axis, 0)[given.index]
    rest = plane if given.paint is None else plane & ~given.paint
    if not rest.any():
        return dataclasses.replace(given, points=())
    return dataclasses.replace(given, box=tuple(map(float, box_from_mask(rest))))


def slice_prompts(
    interactions: Sequence[Interaction], with_points: bool
) -> dict[int, dict[int, dict[str, Any]]]:
    """Returns axis -> slice -> box and points, as `prompt_file` has them, of all interactions.

    On a slice, a new box of the object replaces the box before. The box of a stroke is joined with
    it, and a box of what stays (see `with_rest`) never replaces one that was drawn.
    """
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for given in interactions:
        prompt = found.setdefault(given.axis, {}).setdefault(given.index, {})
        if given.box is not None:
            box = given.box
            if "box" in prompt and not given.include:
                box = prompt["box"]
            elif "box" in prompt and given.paint is not None:
                old = prompt["box"]
                box = (*map(min, old[:2], box[:2]), *map(max, old[2:], box[2:]))
            prompt["box"] = list(box)
        if with_points and given.points:
            points = [[x, y, int(given.include)] for x, y in given.points]
            prompt["points"] = prompt.get("points", []) + points
    slices = {
        axis: {index: prompt for index, prompt in by_index.items() if _is_positive(prompt)}
        for axis, by_index in found.items()
    }
    return {axis: by_index for axis, by_index in slices.items() if by_index}


def _is_positive(prompt: dict[str, Any]) -> bool:
    return "box" in prompt or any(label for _, _, label in prompt.get("points", []))


def _others(axis: int) -> list[int]:
    return [other for other in range(3) if other != axis]


def _flat_axis(sides: Sequence[int], preferred: int) -> int | None:
    flat = [axis for axis in range(3) if sides[axis] == 1]
    return preferred if preferred in flat else flat[0] if flat else None


def _ranges(name: str, coords: Any, shape: Shape) -> list[tuple[int, int]]:
    """Whole half-open ranges inside the volume."""
    ranges = []
    for (low, high), side in zip(_numbers(name, coords, (3, 2)).tolist(), shape, strict=True):
        # Edges drawn within a voxel belong to it; an interval of length 1 stays one.
        start = math.floor(low + 0.5)
        stop = max(math.floor(high + 0.5), start + 1) if high > low else start
        start, stop = max(start, 0), min(stop, side)
        if stop <= start:
            raise UserError(f"{name}: {coords}; give [[a, b], ...] inside {list(shape)} voxels")
        ranges.append((start, stop))
    return ranges


def _numbers(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != shape or not np.isfinite(array).all() or np.abs(array).max() > 1e9:
        raise UserError(f"{name}: {str(values)[:80]}; give numbers, shape {list(shape)}")
    return array
