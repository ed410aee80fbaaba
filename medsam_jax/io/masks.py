"""Checks label maps and puts them onto the grid of their image."""

import dataclasses

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.geometry import Scan, resample, same_grid, share_outside

MOST_OUTSIDE = 0.25  # of a mask's labelled voxels outside the image; more are another scan's mask
_GREY_LEVELS = 16  # label maps below hold no grey levels
_MOST_LABELS = 64  # of a picture with labels 1 to n that is not doubted


def as_labels(array: np.ndarray, path: str) -> np.ndarray:
    """Returns a mask array as int32. Raises UserError for colours, negatives and fractions."""
    if array.ndim == 4:
        if not (array[..., :1] == array).all():
            raise UserError(f"{path}: the mask has colours; save a label map (one number a pixel)")
        array = array[..., 0]
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(invalid="ignore"):  # signalling NaN
            bad = ~np.isfinite(array) | (array != np.round(array))
        if bad.any():
            raise UserError(
                f"{path}: {np.count_nonzero(bad)} voxels are no whole labels (e.g. "
                f"{array[bad][0]:g}); "
                "threshold a probability map, or resample with nearest neighbour"
            )
    if array.size and array.min() < 0:
        raise UserError(f"{path}: has a negative label ({array.min():g}); renumber the labels")
    if array.size and array.max() > np.iinfo(np.int32).max:
        raise UserError(f"{path}: label {array.max():g} is too large; renumber the labels")
    return array.astype(np.int32)


def check_sharp(labels: np.ndarray, path: str) -> None:
    """Refuses a mask whose edges were smoothed: its in-between values would become objects.

    Such a value fills no 3 x 3 pixels anywhere and mostly has a smaller and a larger one within two
    pixels, and most edges pass through such values. Labels 1 to n up to 64, and those below 16, are
    never refused. Of a volume, the slice with most labelled pixels is looked at.
    """
    import cv2

    if not labels.size or labels.max() < _GREY_LEVELS:
        return
    plane = labels[np.argmax([np.count_nonzero(plane) for plane in labels])]
    found = np.unique(plane) if plane.max() > 65535 else np.flatnonzero(np.bincount(plane.ravel()))
    is_counted = found[0] == 0 and found[-1] == len(found) - 1 <= _MOST_LABELS
    if len(found) < 3 or is_counted or len(found) > 65535:
        return
    ranks = np.searchsorted(found, plane).astype(np.uint16)
    low, high = (shift(ranks, np.ones((3, 3), np.uint8)) for shift in (cv2.erode, cv2.dilate))
    is_thin = np.bincount(ranks[low == high], minlength=len(found)) == 0
    if is_thin.all():
        return  # noise, or a tiny picture
    is_thin[ranks.max()] = is_thin[0] = False
    thin = is_thin[ranks]
    if not thin.any():
        return
    low, high = (shift(ranks, np.ones((5, 5), np.uint8)) for shift in (cv2.erode, cv2.dilate))
    between = (low < ranks) & (ranks < high)
    smooth = edges = 0
    for one, other, one_thin, other_thin in (
        (ranks[1:], ranks[:-1], thin[1:], thin[:-1]),
        (ranks[:, 1:], ranks[:, :-1], thin[:, 1:], thin[:, :-1]),
    ):
        differ = one != other
        edges += np.count_nonzero(differ)
        smooth += np.count_nonzero(differ & (one_thin | other_thin))
    if smooth > edges / 2 and np.count_nonzero(between & thin) > np.count_nonzero(thin) / 2:
        values = ", ".join(str(value) for value in found[1:6])
        raise UserError(
            f"{path}: its edges are smeared (values {values}{', ...' if len(found) > 6 else ''} "
            "side by side); threshold it, or save it without smoothing; renumber labels that are "
            "meant so from 1"
        )


def on_grid(mask: Scan, scan: Scan) -> Scan:
    """Returns a mask of int32 labels on the grid of `scan`, with notes on what was done.

    Raises:
      UserError: grids that do not overlap, or of which more than `MOST_OUTSIDE` of the labelled
        voxels do not; a mask that lost its geometry; different sizes if a file has no geometry.
    """
    if mask.affine is None or scan.affine is None:
        if mask.array.shape != scan.array.shape[:3]:
            raise UserError(
                f"{mask.path}: mask of {_size(mask.array)} for an image of {_size(scan.array)} "
                "without physical geometry to align them; save both at the same size"
            )
        if mask.affine is scan.affine or len(mask.array) == 1:
            return mask
        lacking = "mask" if mask.affine is None else "image"
        note = f"The {lacking} states no position; the mask is taken voxel by voxel."
        return dataclasses.replace(mask, notes=(*mask.notes, note))
    if same_grid(mask, scan):
        return mask
    _check_geometry(mask, scan)
    outside = share_outside(mask, scan)
    if MOST_OUTSIDE < outside < 1:
        raise UserError(
            f"{mask.path}: {outside:.0%} of the mask lies outside the image {scan.path} (mask "
            f"{describe(mask)}; image {describe(scan)}); pair the right files, or copy the image's "
            "geometry into the mask"
        )
    note = "The mask is on another grid; it was resampled by nearest neighbour."
    if outside:
        note = f"{note[:-1]}; {max(outside, 0.0001):.2%} of it lies outside the image."
    return dataclasses.replace(mask, array=resample(mask, scan), notes=(*mask.notes, note))


def _check_geometry(mask: Scan, scan: Scan) -> None:
    """Refuses a mask of the image's size if one of them has lost the geometry that the other has.

    Grids whose corners are the same places are only flipped and are no such case.
    """
    if mask.array.shape != scan.array.shape[:3] or _same_corners(mask, scan):
        return
    both = f"(mask {describe(mask)}; image {describe(scan)})"
    if lost := _lost(mask, scan):
        raise UserError(
            f"{mask.path}: has the size of the image {scan.path}, but not its {lost} {both}; copy "
            "the image's geometry into the mask"
        )
    if lost := _lost(scan, mask):
        raise UserError(
            f"{mask.path}: has the size of the image {scan.path}, which has not its {lost} {both}; "
            "copy the mask's geometry into the image if it is right"
        )


def _lost(one: Scan, other: Scan) -> str:
    """Returns which parts of the geometry of `other` a scan has lost: names, or "".

    Lost parts have a default: an origin of 0, a spacing of 1 on all axes, a direction along the
    axes at the same origin; or x and y have the other sign (RAS for LPS).
    """
    origin, spacing, direction = (np.array(part) for part in one.affine)
    its_origin, its_spacing, its_direction = (np.array(part) for part in other.affine)
    step = 0.1 * min(its_spacing)
    turned = np.abs(direction - its_direction).max() > 1e-3
    along = np.isin(np.abs(direction), (0, 1)).all()
    flip = np.array([-1, -1, 1])
    mirrored = np.abs(np.reshape(direction, (3, 3)).T * flip - its_direction.reshape(3, 3).T).max()
    lost = {
        "origin": not origin.any() and np.abs(its_origin).max() > step,
        "spacing": (spacing == 1).all() and np.abs(its_spacing - 1).max() > 0.01,
        "direction": turned and along and np.abs(origin - its_origin).max() < step,
        "sign of x and y": np.abs(origin * flip - its_origin).max() < step and mirrored < 1e-3,
    }
    return " and ".join(name for name, is_lost in lost.items() if is_lost)


def _same_corners(mask: Scan, scan: Scan) -> bool:
    """Returns whether two grids have the same corners, in any order, within half a voxel."""
    ones, others = _corners(mask), _corners(scan)
    distance = np.linalg.norm(ones[:, None] - others[None], axis=-1)
    return bool(distance.min(axis=1).max() < 0.5 * min(scan.affine[1]))


def _corners(scan: Scan) -> np.ndarray:
    last = np.array(scan.array.shape[2::-1]) - 1
    corners = np.array([(*(last * [i & 1, i >> 1 & 1, i >> 2 & 1]), 1) for i in range(8)])
    return corners @ scan.to_ras().T


def describe(scan: Scan) -> str:
    """Returns origin, spacing and direction of a scan in one short line, x y z, LPS."""
    origin, spacing, direction = scan.affine
    numbers = [" ".join(f"{value:.4g}" for value in part) for part in (origin, spacing)]
    turned = "" if np.allclose(direction, np.eye(3).ravel(), atol=1e-4) else " direction "
    turned += " ".join(f"{round(v, 2) + 0:g}" for v in direction) if turned else ""
    return f"origin {numbers[0]} spacing {numbers[1]}{turned}"


def _size(array: np.ndarray) -> str:
    return " x ".join(str(side) for side in reversed(array.shape[:3]))
