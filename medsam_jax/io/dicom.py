"""Reads DICOM files and series. Rules decide by the headers, before any pixels are read."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from medsam_jax.errors import UserError
from medsam_jax.io import dicom_stack, formats
from medsam_jax.io.dicom_frames import read_pixels
from medsam_jax.io.dicom_groups import frames_of
from medsam_jax.io.dicom_headers import Header, read_header, reading
from medsam_jax.io.dicom_kinds import is_other, is_segmentation, why_no_image
from medsam_jax.io.dicom_masks import read_segmentation
from medsam_jax.io.files import split_series
from medsam_jax.io.geometry import Scan

SUFFIXES = (".dcm", ".dicom", ".ima")
_LEAST = 132  # bytes of a DICOM file's preamble


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
    for uid, headers in _look(folder).series.items():
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


def frame_order(file: str) -> list[int]:
    """Returns the index in its file of each slice of a DICOM file's array."""
    with reading(file):
        return [frame.index for frame in _order([read_header(file)], file)[0]]


def dicom_modality(path: str) -> str:
    """Returns the modality that the first file of a DICOM path states, or ""."""
    return str(read_header(dicom_files(path)[0]).get("Modality", "")).strip()


def read_series(path: str, image: Scan | None = None) -> Scan:
    """Reads the series of a folder, or one of several (`FOLDER#SERIES_UID`).

    As a mask of `image`, a folder may also hold one DICOM SEG and no images.

    Raises:
      UserError: no series, or several and none chosen; a file that may belong to it and cannot be
        read; slices that form no volume.
    """
    folder, wanted = split_series(path)
    found = _look(folder)
    files = {uid: [header.file for header in of] for uid, of in found.series.items()}
    broken = [line for uid, line in found.broken if not uid or not wanted or uid == wanted]
    if broken and (len(files) <= 1 or wanted):
        more = f" ({len(broken) - 1} more files cannot be read)" if len(broken) > 1 else ""
        raise UserError(broken[0] + more)
    if image is not None and not files and len(found.segmentations) == 1:
        return read_file(found.segmentations[0], image)
    if not files:
        raise _nothing_here(path, folder, found)
    scan = _read(found.series[_choose_series(path, wanted, files)], path)
    return dataclasses.replace(scan, notes=scan.notes + _notes(found, folder))


def read_file(path: str, image: Scan | None = None) -> Scan:
    """Reads a DICOM file of one slice or several frames; a mask of `image` may be a DICOM SEG."""
    header = read_header(path)
    if image is not None and is_segmentation(header):
        with reading(path):
            return read_segmentation(header, path, image)
    if why := why_no_image(header):
        raise UserError(f"{path}: {why}")
    return _read([header], path)


def _read(headers: Sequence[Header], path: str) -> Scan:
    with reading(path):
        frames, affine, spacing, notes = _order(headers, path)
        array, more = read_pixels(frames)
    noted = dict.fromkeys(note for frame in frames for note in frame.header.notes + frame.notes)
    return Scan(array, spacing, affine, path, (*noted, *notes, *more))


def _order(headers: Sequence[Header], path: str) -> tuple:
    frames = [frame for header in headers for frame in frames_of(header)]
    return dicom_stack.order(frames, path)


@dataclasses.dataclass(frozen=True)
class _Found:
    """DICOM files of a folder.

    series: headers of the files with pixels by series.
    others: a line for each whole file that is no image, such as an RTSTRUCT.
    segmentations: DICOM SEG among these.
    broken: (series or "", line) of each file that cannot be read and may be a slice.
    """

    series: dict[str, list[Header]]
    others: list[str]
    segmentations: list[str]
    broken: list[tuple[str, str]]


def _look(folder: str | Path) -> _Found:
    """Reads the headers in a folder, by name; only its DICOM files and damaged ones are noticed."""
    found = _Found({}, [], [], [])
    for file in sorted(Path(folder).iterdir()):
        if file.is_dir() or file.name.startswith(".") or not _may_be_slice(file):
            continue
        if not file.exists():
            found.broken.append(("", f"{file}: is a link to a file that does not exist; mend it"))
            continue
        if (size := file.stat().st_size) < _LEAST:
            found.broken.append(("", f"{file}: has {size} bytes, no slice; copy it again"))
            continue
        try:
            header = read_header(file)
        except UserError as error:
            found.broken.append(("", str(error)))
            continue
        why = why_no_image(header)
        if not why:
            found.series.setdefault(header.series, []).append(header)
        elif is_segmentation(header) or is_other(header):
            found.others.append(f"{file}: {why}")
            if is_segmentation(header):
                found.segmentations.append(str(file))
        else:
            found.broken.append((header.series, f"{file}: {why}"))
    return found


def _notes(found: _Found, folder: str) -> tuple[str, ...]:
    """Returns notes on DICOM files that are no slices, and on slices that lie in a folder below."""
    notes = ()
    for place in sorted(filter(Path.is_dir, Path(folder).iterdir())):
        below = _look(place).series
        if count := sum(len(below[uid]) for uid in below.keys() & found.series.keys()):
            notes += (f"{count} files of this series lie in {place.name}/ and were not read.",)
    names = [Path(line.split(": is a ")[0]).name for line in found.others]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    if not names:
        return notes
    return (
        *notes,
        f"The folder also holds DICOM files that are no images: {', '.join(names[:3])}{more}.",
    )


def _may_be_slice(file: Path) -> bool:
    """Returns whether a file is DICOM by suffix or bytes, or is nameless and cannot be read."""
    if file.suffix.lower() in SUFFIXES or is_dicom(str(file)):
        return True
    if file.suffix and not file.suffix[1:].isdigit():  # UIDs end with numbers
        return False
    return not os.access(file, os.R_OK) or file.stat().st_size < _LEAST


def _nothing_here(path: str, folder: str, found: _Found) -> UserError:
    """Returns the error of a folder without images; it names a folder below that has some."""
    below = (Path(root) for root, _, _ in os.walk(folder) if root != folder)
    inner = next((place for place in itertools.islice(below, 1000) if _look(place).series), None)
    if inner is not None:
        return UserError(f"{path}: its DICOM files lie in folders below it; give one, e.g. {inner}")
    if found.others:
        return UserError(f"{path}: no DICOM series of images in this folder; {found.others[0]}")
    return UserError(f"{path}: no DICOM series in this folder; name a file or another folder")


def _choose_series(path: str, wanted: str, found: dict[str, Sequence[str]]) -> str:
    """Returns the series to read; raises UserError for none, several or an unknown one."""
    if not found:
        raise _nothing_here(path, split_series(path)[0], _Found({}, [], [], []))
    if not wanted and len(found) > 1:
        listed = "; ".join(f"{uid} ({len(files)} files)" for uid, files in sorted(found.items()))
        raise UserError(
            f"{path}: {len(found)} DICOM series in one folder: {listed}; "
            "choose one as FOLDER#SERIES_UID"
        )
    if wanted and wanted not in found:
        raise UserError(f"{path}: no series {wanted!r} here; it has {', '.join(sorted(found))}")
    return wanted or next(iter(found))
