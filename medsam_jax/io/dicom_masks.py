"""Reads DICOM Segmentations as label maps: the label is the segment's number."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.dicom_frames import Frame, stored_pixels
from medsam_jax.io.dicom_groups import frames_of, numbers
from medsam_jax.io.dicom_headers import EXPORT, Header, reading
from medsam_jax.io.dicom_stack import check_alike
from medsam_jax.io.geometry import Scan

_APART = 0.1  # of a voxel: frames nearer than that to a slice are on it


def read_segmentation(header: Header, path: str, image: Scan | None) -> Scan:
    """Reads a Segmentation; frames may be of any segment and in any order.

    Frames that lie on slices of `image` are placed on its grid. Others form a grid of their own,
    whose empty slices a SEG does not store.

    Raises:
      UserError: fractions, segments that overlap, frames without place or of several orientations.
    """
    with reading(path):
        frames = frames_of(header)
        numbers_of = _segments(header)
        planes = _planes(header, path)
        check_alike(frames, path)
        if any(frame.position is None or frame.axes is None for frame in frames):
            raise UserError(f"{path}: its segments state no position or orientation; {EXPORT}")
        places, shape, affine = _places(header, frames, planes.shape[1:], path, image)
        labels = np.zeros(shape, np.int32)
        for plane, number, place in zip(planes, numbers_of, places, strict=True):
            _put(labels[place], plane, number, path)
    return Scan(labels, tuple(reversed(affine[1])), affine, path)


def _segments(header: Header) -> list[int]:
    """Returns the segment of each frame; 0 where pixels are segment numbers themselves."""
    if header.get("SegmentationType") == "LABELMAP":
        return [0] * header.frame_count
    shared = header.get("SharedFunctionalGroupsSequence")
    found = []
    for index, group in enumerate(header.get("PerFrameFunctionalGroupsSequence", [])):
        items = group.get("SegmentIdentificationSequence") or (
            shared[0].get("SegmentIdentificationSequence") if shared else None
        )
        number = int(items[0].get("ReferencedSegmentNumber") or 0) if items else 0
        if number < 1:
            raise UserError(f"{header.file}: frame {index + 1} names no segment; {EXPORT}")
        found.append(number)
    return found


def _planes(header: Header, path: str) -> np.ndarray:
    planes = _bits(header, path) if header.integer("BitsAllocated") == 1 else stored_pixels(header)
    kind = str(header.get("SegmentationType", "BINARY"))
    if kind == "FRACTIONAL":
        most = header.integer("MaximumFractionalValue", 255)
        if not np.isin(planes, (0, most)).all():
            raise UserError(
                f"{path}: is a DICOM Segmentation of fractions (probabilities or occupancy), no "
                "label map; threshold it and save a binary SEG or a label map"
            )
        planes = planes > 0
    return planes


def _bits(header: Header, path: str) -> np.ndarray:
    """Returns frames of one bit a pixel; a frame may begin within a byte."""
    shape = (header.frame_count, *header.shape)
    count = int(np.prod(shape))
    packed = np.fromfile(header.file, np.uint8, -(-count // 8), offset=header.start)
    if header.length == -1 or len(packed) < -(-count // 8):
        raise UserError(f"{path}: the file is cut within its pixels, or compressed; {EXPORT}")
    return np.unpackbits(packed, bitorder="little", count=count).reshape(shape)


def _put(labels: np.ndarray, plane: np.ndarray, number: int, path: str) -> None:
    """Writes a frame into its slice; refuses a second label of a pixel."""
    here = plane > 0
    taken = labels[here]
    values = plane[here].astype(np.int32) if number == 0 else number
    clash = (taken != 0) & (taken != values)
    if clash.any():
        other = int(taken[clash][0])
        now = int(values[clash][0]) if number == 0 else number
        raise UserError(
            f"{path}: segments {other} and {now} overlap, in {np.count_nonzero(clash)} pixels of "
            "one slice; a label map has one label a pixel: save them as a SEG each"
        )
    labels[here] = values


def _places(
    header: Header, frames: Sequence[Frame], shape: tuple, path: str, image: Scan | None
) -> tuple[list[int], tuple[int, ...], tuple]:
    """Returns the slice of each frame, and shape and affine of the grid."""
    if image is not None and image.affine is not None:
        places = _on_slices(frames, shape, image)
        if places is not None:
            return places, image.array.shape[:3], image.affine
    axes = np.reshape(frames[0].axes, (2, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    normal = np.cross(*axes)
    points = np.array([frame.position for frame in frames])
    depths = points @ normal
    first = int(np.argmin(depths))
    step = _step(header, depths - depths[first], path)
    drift = np.abs((points - points[first]) @ axes.T).max()
    spacing = frames[0].spacing
    if spacing is None:
        raise UserError(f"{path}: its segments state no PixelSpacing; {EXPORT}")
    if drift > 0.5 * min(spacing):
        raise UserError(
            f"{path}: its frames are displaced sideways by up to {drift:.1f} mm and lie on no "
            "slices of the image; give the image that it was drawn on"
        )
    places = np.round((depths - depths[first]) / step).astype(int).tolist()
    direction = np.stack([*axes, normal], axis=1).ravel().tolist()
    affine = (tuple(points[first].tolist()), (spacing[1], spacing[0], step), tuple(direction))
    return places, (max(places) + 1, *shape), affine


def _on_slices(frames: Sequence[Frame], shape: tuple, image: Scan) -> list[int] | None:
    """Returns the slice of the image on which each frame lies; None if one lies on none."""
    if shape != image.array.shape[1:3] or frames[0].spacing is None:
        return None
    origin, spacing, direction = (np.array(part) for part in image.affine)
    steps = np.reshape(direction, (3, 3)) * spacing  # a column for each of x, y, z
    axes = np.reshape(frames[0].axes, (2, 3)) * np.array(frames[0].spacing[::-1])[:, None]
    size = np.array(shape[::-1]) - 1
    if np.abs((axes - steps[:, :2].T) * size[:, None]).max() > _APART * spacing.min():
        return None
    offsets = (np.array([frame.position for frame in frames]) - origin) @ np.linalg.inv(steps).T
    places = np.round(offsets[:, 2]).astype(int)
    is_off = np.abs(offsets - np.stack([0 * places, 0 * places, places], 1)).max() > _APART
    if is_off or places.min() < 0 or places.max() >= len(image.array):
        return None
    return places.tolist()


def _step(header: Header, depths: np.ndarray, path: str) -> float:
    """Returns the mm between slices: as stated, if all frames are whole steps apart."""
    gaps = np.diff(np.unique(np.round(depths, 3)))
    gaps = gaps[gaps > 0.01]
    shared = header.get("SharedFunctionalGroupsSequence")
    measures: Any = shared[0].get("PixelMeasuresSequence") if shared else None
    stated = [
        numbers([measures[0].get(key)], 1) if measures and measures[0].get(key) else None
        for key in ("SpacingBetweenSlices", "SliceThickness")
    ]
    candidates = [abs(found[0]) for found in stated if found and found[0]]
    for step in [*candidates, *([float(gaps.min())] if len(gaps) else [])]:
        whole = np.round(depths / step)
        far = depths.max() / step
        if math.isfinite(far) and far < 1e5 and np.abs(depths - whole * step).max() < 0.2 * step:
            return float(step)
    if not len(gaps) and not candidates:
        return 1.0
    raise UserError(f"{path}: its slices are no whole steps apart; save it as a label map")
