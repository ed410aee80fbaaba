"""Reads DICOM Segmentation objects (SEG) as label maps on the slices that they refer to."""

import dataclasses
import math

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.dicom_decode import raw_content
from medsam_jax.io.dicom_frames import Frame, stored_pixels
from medsam_jax.io.dicom_groups import frames_of
from medsam_jax.io.dicom_headers import EXPORT, Header
from medsam_jax.io.dicom_stack import check_alike, order
from medsam_jax.io.geometry import Scan

_APART = 0.1  # of a voxel: frames nearer than that to a slice lie on it
_MOST_EMPTY = 1000  # slices without a frame; more are positions that are damaged


def read_segmentation(header: Header, path: str, image: Scan) -> Scan:
    """Returns a label map whose labels are the numbers of segments, with their names.

    Frames that lie on slices of the image are placed on its grid. Others form a grid of their own:
    a SEG may leave out slices without a label, and those between others are put in.

    Raises:
      UserError: a fractional SEG, frames without a place or without a segment.
    """
    kind = str(header.get("SegmentationType", "")).upper()
    if kind not in ("BINARY", "LABELMAP"):
        raise UserError(
            f"{path}: is a DICOM SEG of type {kind or 'unknown'}, which holds no labels; save it "
            "as BINARY (threshold it) or as a label map, e.g. .nii.gz"
        )
    frames = frames_of(header)
    check_alike(frames, path)
    planes = _bits(header) if kind == "BINARY" else _numbers(header)
    numbers = [_segment(frame) for frame in frames] if kind == "BINARY" else [0] * len(frames)
    places, scan = _on_slices(frames, image) or _grid(frames, path)
    labels = np.zeros((len(scan.array), *header.shape), np.uint16)
    shared = 0
    for frame, number, place in zip(frames, numbers, places, strict=True):
        plane = planes[frame.index] * np.uint16(number or 1)
        shared += int(np.count_nonzero((labels[place] > 0) & (plane > 0)))
        np.maximum(labels[place], plane, out=labels[place])
    note = f"{shared} voxels are in several segments; they take the highest number of these."
    notes = (note,) if shared else ()
    return dataclasses.replace(scan, array=labels, notes=notes, label_names=_names(header))


def _on_slices(frames: list[Frame], image: Scan) -> tuple[np.ndarray, Scan] | None:
    """Returns the image's slice of each frame, and the image; None if a frame is on no slice."""
    first, shape = frames[0], frames[0].header.shape
    placed = all(frame.position is not None for frame in frames) and first.axes is not None
    if not placed or not first.spacing or image.affine is None or shape != image.array.shape[1:3]:
        return None
    origin, spacing, direction = (np.array(part) for part in image.affine)
    steps = np.reshape(direction, (3, 3)) * spacing  # columns: mm from voxel to voxel
    in_plane = (np.reshape(first.axes, (2, 3)) * np.reshape(first.spacing[::-1], (2, 1))).T
    ends = (in_plane - steps[:, :2]) * np.array(shape[::-1])
    points = np.array([frame.position for frame in frames])
    voxels = np.linalg.solve(steps, (points - origin).T).T
    places = np.round(voxels[:, 2])
    off = np.abs(voxels - np.stack([0 * places, 0 * places, places], axis=1)).max()
    is_inside = places.min() >= 0 and places.max() < len(image.array)
    if not is_inside or off > _APART or np.abs(ends).max() > _APART * spacing.min():
        return None
    return places.astype(int), dataclasses.replace(image, path=first.header.file)


def _grid(frames: list[Frame], path: str) -> tuple[np.ndarray, Scan]:
    """Returns the slice of each frame, and an empty volume on the grid of all slices."""
    known = [frame for frame in frames if frame.position is not None and frame.axes is not None]
    if len(known) < len(frames):
        if known or len({_segment(frame) for frame in frames}) < len(frames):
            raise UserError(f"{path}: frames of this DICOM SEG state no position; {EXPORT}")
        spacing = (math.nan, *(frames[0].spacing or (math.nan, math.nan)))
        return np.zeros(len(frames), int), Scan(np.zeros((1, 0, 0)), spacing, None, path)
    normal = np.cross(*np.reshape(frames[0].axes, (2, 3)))
    depths = np.array([frame.position for frame in frames]) @ normal
    sorted_depths = np.sort(depths)
    steps = np.diff(sorted_depths)
    steps = steps[steps > 0.01]
    step = _stated_step(frames[0].header)
    is_stated = step and np.abs(steps / step - np.round(steps / step)).max(initial=0) < 0.01
    if len(steps) and not is_stated:
        counts = np.round(steps / steps.min())
        step = float(steps.sum() / counts.sum())
    step = step or 1.0
    places = (depths - depths.min()) / step
    count = int(round(places.max())) + 1
    if count > len(frames) + _MOST_EMPTY or np.abs(places - np.round(places)).max() > 0.2:
        raise UserError(
            f"{path}: the frames of this DICOM SEG are not evenly spaced ({steps.min():.2f} to "
            f"{steps.max():.2f} mm apart); {EXPORT}"
        )
    lowest = frames[int(np.argmin(depths))]
    _, (origin, (x, y, _), direction), spacing, _ = order([lowest], path)
    affine = (origin, (x, y, step), direction)
    empty = np.zeros((count, 0, 0))
    return np.round(places).astype(int), Scan(empty, (step, *spacing[1:]), affine, path)


def _stated_step(header: Header) -> float:
    shared = header.get("SharedFunctionalGroupsSequence")
    measures = shared[0].get("PixelMeasuresSequence") if shared else None
    for keyword in ("SpacingBetweenSlices", "SliceThickness") if measures else ():
        value = float(measures[0].get(keyword) or 0)
        if math.isfinite(value) and value > 0:
            return value
    return 0.0


def _names(header: Header) -> dict[int, str]:
    """Returns the label of each segment that has one."""
    segments = header.get("SegmentSequence") or ()
    names = {s.get("SegmentNumber"): str(s.get("SegmentLabel") or "").strip() for s in segments}
    return {int(number): name for number, name in names.items() if number and name}


def _segment(frame: Frame) -> int:
    number = frame.traits.get("ReferencedSegmentNumber", "")
    if not number.isdigit() or not 0 < int(number) < 1 << 16:
        raise UserError(f"{frame.header.file}: {frame.name} names no segment; {EXPORT}")
    return int(number)


def _bits(header: Header) -> np.ndarray:
    """Returns the frames of a binary SEG; its bits run on from row to row and frame to frame."""
    if header.integer("BitsAllocated") != 1:
        return _numbers(header) > 0
    count = header.frame_count * math.prod(header.shape)
    content = raw_content(header)
    if header.length < 0 or not count or len(content) < (count + 7) // 8:
        raise UserError(
            f"{header.file}: its pixels are compressed or cut ({len(content)} bytes for {count} "
            f"bits); {EXPORT}, uncompressed"
        )
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count, bitorder="little")
    return bits.reshape(header.frame_count, *header.shape)


def _numbers(header: Header) -> np.ndarray:
    """Returns the frames of a label map, whose palette is only there to show it."""
    grey = header.values | {"PhotometricInterpretation": "MONOCHROME2"}
    return stored_pixels(dataclasses.replace(header, values=grey))
