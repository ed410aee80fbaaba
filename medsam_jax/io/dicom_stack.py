"""Puts DICOM frames in the order of their positions, and refuses those that form no volume."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.dicom_frames import Frame

_MOST_UNEVEN = 0.2  # of the spacing: positions that were written rounded
_SAME_PLACE = 0.01  # mm
_ROUNDED = 0.002  # by which directions, and mm of pixels, of one series may differ


def order(frames: Sequence[Frame], path: str) -> tuple[list[Frame], tuple | None, tuple, list[str]]:
    """Returns frames in the order of their positions, affine, spacing (z, y, x) and notes.

    Raises:
      UserError: sizes, orientations or pixel spacings that differ, several frames at a position,
        missing slices, a tilted gantry. The message names the files.
    """
    check_alike(frames, path)
    spacing = frames[0].spacing or (math.nan, math.nan)
    if any(frame.position is None or frame.axes is None for frame in frames):
        return _without_position(frames, spacing, path)
    frames, notes = _drop_duplicates(frames)
    notes += _doubts(frames)
    axes, normal = _directions(frames[0], path)
    points = np.array([frame.position for frame in frames])
    depths = points @ normal
    ranks = np.argsort(depths, kind="stable")
    frames, points, depths = [frames[rank] for rank in ranks], points[ranks], depths[ranks]
    if len(frames) == 1:
        step, between = float(frames[0].header.get("SliceThickness", 0) or 1), math.nan
        step = step if step > 0 else 1.0
    else:
        _refuse_shared_positions(frames, depths, path)
        step, note = _step(depths, path)
        between, notes = step, notes + note
        _refuse_drift(points, depths, axes, spacing, path)
        notes += _other_step(frames[0], step)
    known = [1.0 if math.isnan(side) else side for side in spacing]
    direction = np.stack([*axes, normal], axis=1)
    affine = (
        tuple(points[0].tolist()),
        (known[1], known[0], step),
        tuple(direction.ravel().tolist()),
    )
    return frames, affine, (between, *spacing), notes


def _directions(frame: Frame, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and columns as orthogonal unit vectors [2, 3], and their normal.

    Raises UserError where they are far from orthogonal or from length 1.
    """
    row, column = np.reshape(frame.axes, (2, 3))
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if np.abs(np.subtract(lengths, 1)).max() > 0.01 or abs(row @ column) > 0.01:
        stated = ", ".join(f"{value:g}" for value in frame.axes)
        raise UserError(
            f"{path}: ImageOrientationPatient of {frame.name} is {stated}, which are no two "
            "directions at a right angle; export the series again"
        )
    row = row / lengths[0]
    column = column - (row @ column) * row
    column /= np.linalg.norm(column)
    return np.stack([row, column]), np.cross(row, column)


def _doubts(frames: Sequence[Frame]) -> list[str]:
    notes = []
    if frames[0].spacing is None:
        notes.append("The slices state no PixelSpacing: lengths within a slice are in pixels.")
    places = {frame.header.get("FrameOfReferenceUID") for frame in frames} - {None}
    if len(places) > 1:
        notes.append(
            f"The slices state {len(places)} frames of reference; their positions are taken as if "
            "of one."
        )
    return notes


def _other_step(frame: Frame, step: float) -> list[str]:
    """Returns a note where a header states another distance between slices than positions have."""
    stated = str(frame.header.get("SpacingBetweenSlices", ""))
    try:
        differs = abs(abs(float(stated)) - step) > 0.05 * step
    except ValueError:
        return []
    if not differs:
        return []
    return [
        f"The positions are {step:.4g} mm apart, SpacingBetweenSlices says {stated}; the positions "
        "count."
    ]


def _without_position(frames: Sequence[Frame], spacing: tuple, path: str) -> tuple:
    if len({frame.header.file for frame in frames}) > 1:
        lost = [frame.name for frame in frames if frame.position is None or frame.axes is None]
        raise UserError(
            f"{path}: {_listed(lost)} of {len(frames)} slices state no position or orientation; "
            "give each file as an image of its own"
        )
    notes = []
    ratio = [str(side) for side in frames[0].header.get("PixelAspectRatio") or ()]
    if math.isnan(spacing[0]) and len(ratio) == 2 and ratio[0] != ratio[1]:
        notes.append(
            f"Its pixels are not square (PixelAspectRatio {':'.join(ratio)}); they are taken as "
            "they are, without mm."
        )
    if len(frames) > 1:
        notes += [
            "The frames state no positions; they are slices in the file's order, without mm "
            "between them."
        ]
    return list(frames), None, (math.nan, *spacing), notes


def check_alike(frames: Sequence[Frame], path: str) -> None:
    """Refuses frames that differ in what the slices of a volume share."""
    checks: tuple[tuple[str, Callable[[Frame], Any], str], ...] = (
        ("size", lambda f: f.header.shape, "{0[0]} x {0[1]}"),
        ("values a pixel", lambda f: f.header.integer("SamplesPerPixel", 1), "{0}"),
        ("photometric interpretation", _photometric, "{0}"),
        ("modality", lambda f: str(f.header.get("Modality", "")), "{0}"),
        ("units", lambda f: str(f.header.get("RescaleType") or f.header.get("Units", "")), "{0}"),
        ("orientation", lambda f: f.axes, "{0}"),
        ("pixel spacing", lambda f: f.spacing, "{0}"),
    )
    for what, value, form in checks:
        groups: dict[Any, list[str]] = {}
        for frame in frames:
            if (found := value(frame)) != "":
                known = next((key for key in groups if _is_close(key, found)), found)
                groups.setdefault(known, []).append(frame.name)
        if len(groups) <= 1:
            continue
        (most, names), *others = sorted(groups.items(), key=lambda item: -len(item[1]))
        rest = "; ".join(f"{_listed(n)} {form.format(v)}" for v, n in others[:3])
        raise UserError(
            f"{path}: the slices differ in {what}: {rest}; the other {len(names)} "
            f"{form.format(most)}; they are no volume, move the files that do not belong elsewhere"
        )


def _is_close(one: Any, other: Any) -> bool:
    """Returns whether values are the same but for the rounding of their decimals."""
    if isinstance(one, tuple) and isinstance(other, tuple) and isinstance(one[0], float):
        return bool(np.abs(np.subtract(one, other)).max() < _ROUNDED)
    return bool(one == other)


def _photometric(frame: Frame) -> str:
    stated = str(frame.header.get("PhotometricInterpretation", ""))
    return "colours" if stated.startswith(("RGB", "YBR")) else stated


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _drop_duplicates(frames: Sequence[Frame]) -> tuple[list[Frame], list[str]]:
    kept: dict[tuple, Frame] = {}
    twice = []
    for frame in frames:
        uid = str(frame.header.get("SOPInstanceUID", frame.header.file))
        if (uid, frame.index, frame.position) in kept:
            twice.append(frame.name)
        kept.setdefault((uid, frame.index, frame.position), frame)
    note = f"{_listed(twice)}: copies of other files with the same SOPInstanceUID; taken once."
    return list(kept.values()), [note] if twice else []


def _refuse_shared_positions(frames: Sequence[Frame], depths: np.ndarray, path: str) -> None:
    places = 1 + int(np.count_nonzero(np.diff(depths) > _SAME_PLACE))
    if places == len(frames):
        return
    starts = np.concatenate([[0], np.nonzero(np.diff(depths) > _SAME_PLACE)[0] + 1, [len(frames)]])
    counts = np.diff(starts)
    first = int(np.argmax(counts > 1))
    group = frames[starts[first] : starts[first + 1]]
    most, least = int(counts.max()), int(counts.min())
    per = f"{most}" if most == least else f"{least} to {most}"
    differ = ""
    for key in group[0].traits:
        values = list(dict.fromkeys(frame.traits.get(key, "") for frame in group))
        if len(values) > 1:
            differ = f", which differ in {key} ({_listed(values)})"
            break
    raise UserError(
        f"{path}: {len(frames)} slices lie at {places} positions, {per} at each{differ}; they are "
        "phases, echoes or copies: save each volume in a folder of its own (at the first position: "
        f"{_listed([frame.name for frame in group])})"
    )


def _step(depths: np.ndarray, path: str) -> tuple[float, list[str]]:
    """Returns the mm between slices, and a note if positions were rounded."""
    steps = np.diff(depths)
    mean = float(depths[-1] - depths[0]) / len(steps)
    if np.ptp(steps) <= max(0.01, 0.01 * np.median(steps)):
        return mean, []
    off = np.abs(depths - depths[0] - mean * np.arange(len(depths))).max()
    if max(off, np.abs(steps - mean).max()) >= _MOST_UNEVEN * mean:
        raise UserError(
            f"{path}: slices are not evenly spaced ({steps.min():.2f} to {steps.max():.2f} mm "
            "apart); files are missing or belong to another series"
        )
    return mean, [
        f"The slices are {steps.min():.4g} to {steps.max():.4g} mm apart; the mean, {mean:.4g} mm, "
        f"is used (no slice is more than {off:.2g} mm from its place)."
    ]


def _refuse_drift(
    points: np.ndarray, depths: np.ndarray, axes: np.ndarray, spacing: tuple, path: str
) -> None:
    """Refuses slices that move along rows or columns from one to the next (gantry tilt)."""
    shifts = (points - points[0]) @ axes.T
    drift = np.abs(shifts).max()
    pixel = np.nanmin([*spacing, np.inf])
    if drift <= max(0.1, 0.25 * min(pixel, 1e3)):
        return
    along = depths - depths[0]
    slopes = shifts.T @ along / (along @ along)
    if np.abs(shifts - along[:, None] * slopes).max() < 0.5 * drift:
        angle = math.degrees(math.atan(float(np.linalg.norm(slopes))))
        raise UserError(
            f"{path}: the gantry was tilted by {angle:.1f} degrees: slices are displaced sideways "
            f"by up to {drift:.1f} mm; resample the scan to orthogonal axes (e.g. dcm2niix, 3D "
            "Slicer)"
        )
    raise UserError(
        f"{path}: slices are displaced sideways by up to {drift:.1f} mm; they are no volume, "
        "resample the scan to orthogonal axes"
    )
