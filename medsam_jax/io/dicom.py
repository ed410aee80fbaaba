"""Reads DICOM files and series. Rules decide by the headers, before any pixels are read."""

import math
from collections.abc import Sequence
from pathlib import Path

from medsam_jax.errors import UserError
from medsam_jax.io import dicom_stack, formats
from medsam_jax.io.dicom_frames import Frame, read_pixels
from medsam_jax.io.dicom_headers import TELLING, Header, read_header, reading
from medsam_jax.io.files import split_series
from medsam_jax.io.geometry import Scan


def is_dicom(path: str) -> bool:
    """Returns whether a path is read as DICOM: a folder, or a file with DICOM's bytes or suffix."""
    file = Path(split_series(path)[0])
    if file.is_dir() or file.suffix.lower() == ".dcm":
        return True
    try:
        return formats.identify(file).name == "DICOM"
    except (OSError, UserError):
        return False


def list_series(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Maps the UID of each DICOM series directly in a folder to its files in slice order."""
    found = {}
    for uid, headers in _group(_headers(folder)[0]).items():
        try:
            with reading(folder):
                frames = _order(headers, str(folder))[0]
            found[uid] = tuple(dict.fromkeys(frame.header.file for frame in frames))
        except UserError:  # raised again when it is read
            found[uid] = tuple(header.file for header in headers)
    return found


def dicom_files(path: str) -> tuple[str, ...]:
    """Returns the files of a DICOM path (`is_dicom`), one per slice, in the array's slice order.

    Raises:
      UserError: no series, or several and none chosen.
    """
    folder, wanted = split_series(path)
    if not Path(folder).is_dir():
        return (path,)
    found = list_series(folder)
    return found[_choose_series(path, wanted, found)]


def read_series(path: str) -> Scan:
    folder, wanted = split_series(path)
    headers, unreadable = _headers(folder)
    found = _group(headers)
    if unreadable and (found or not wanted):
        raise UserError(unreadable[0])
    uid = _choose_series(path, wanted, {key: [h.file for h in of] for key, of in found.items()})
    return _read(found[uid], path)


def read_file(path: str) -> Scan:
    """Reads a DICOM file: one slice, or as many as it has frames."""
    return _read([read_header(path)], path)


def _read(headers: Sequence[Header], path: str) -> Scan:
    with reading(path):
        frames, affine, spacing, notes = _order(headers, path)
        array = read_pixels(frames)
    noted = dict.fromkeys(note for header in headers for note in header.notes)
    return Scan(array, spacing, affine, path, (*noted, *notes))


def _order(headers: Sequence[Header], path: str) -> tuple:
    frames = [frame for header in headers for frame in _frames(header)]
    return dicom_stack.order(frames, path)


def _headers(folder: str | Path) -> tuple[list[Header], list[str]]:
    """Returns the headers of a folder's DICOM files by name, and a line for each broken one."""
    headers, unreadable = [], []
    for file in sorted(Path(folder).iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        is_named = file.suffix.lower() in (".dcm", ".dicom", ".ima")
        if file.stat().st_size == 0:
            if is_named:
                unreadable.append(f"{file}: is empty (0 bytes); copy the file again")
            continue
        if not is_named and not is_dicom(str(file)):
            continue
        try:
            headers.append(read_header(file))
        except UserError as error:
            unreadable.append(str(error))
    return headers, unreadable


def _group(headers: Sequence[Header]) -> dict[str, list[Header]]:
    found: dict[str, list[Header]] = {}
    for header in headers:
        if header.pixels:
            found.setdefault(header.series, []).append(header)
    return found


def _frames(header: Header) -> list[Frame]:
    """Returns the frames of a file with their places and scalings."""
    position = _numbers(header, "ImagePositionPatient", 3)
    axes = _numbers(header, "ImageOrientationPatient", 6)
    spacing = _numbers(header, "PixelSpacing", 2)
    slope = float(header.get("RescaleSlope", 1))
    intercept = float(header.get("RescaleIntercept", 0))
    traits = {key: str(header.get(key)) for key in TELLING if header.get(key) is not None}
    if header.frame_count > 1:
        position = None
    return [
        Frame(header, index, position, axes, spacing, slope, intercept, traits)
        for index in range(header.frame_count)
    ]


def _numbers(header: Header, keyword: str, count: int) -> tuple[float, ...] | None:
    """Returns the finite numbers of a tag; None if it is missing or has another count."""
    value = header.get(keyword)
    if value is None or isinstance(value, (str, int, float)) or len(value) != count:
        return None
    numbers = tuple(float(part) for part in value)
    return numbers if all(math.isfinite(part) for part in numbers) else None


def _choose_series(path: str, wanted: str, found: dict[str, Sequence[str]]) -> str:
    """Returns the series to read; raises UserError for none, several or an unknown one."""
    if not found:
        raise UserError(f"{path}: no DICOM series in this folder; name a file or another folder")
    if not wanted and len(found) > 1:
        listed = "; ".join(f"{uid} ({len(files)} files)" for uid, files in sorted(found.items()))
        raise UserError(
            f"{path}: {len(found)} DICOM series in one folder: {listed}; "
            "choose one as FOLDER#SERIES_UID"
        )
    if wanted and wanted not in found:
        raise UserError(f"{path}: no series {wanted!r} here; it has {', '.join(sorted(found))}")
    return wanted or next(iter(found))
