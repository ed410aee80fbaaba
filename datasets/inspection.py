"""Describes scans as this library reads them: format, geometry, values, notes, refusals."""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import numpy as np

from medsam_jax.data.modality import doubts, rule_of
from medsam_jax.data.recipes import DEFAULT_RECIPE, get_recipe
from medsam_jax.errors import UserError
from medsam_jax.inference.outputs import stem
from medsam_jax.io import dicom, formats
from medsam_jax.io.files import split_series
from medsam_jax.io.folders import search
from medsam_jax.io.geometry import Scan, slice_axis
from medsam_jax.io.notes import notes_of_pair
from medsam_jax.io.scans import read_mask_scan, read_scan

PERCENTILES = (0.5, 50.0, 99.5)
UNKNOWN = "not known here"
MASK_VALUES = 64  # an image has more grey levels
_PLANES = ("sagittal", "coronal", "axial")  # cut across them


@dataclasses.dataclass(frozen=True)
class Description:
    """A file, folder or DICOM series as it would be read; fields are empty where it is refused."""

    path: str
    format: str
    refused: str = ""  # the one line of the error
    size: tuple[int, ...] = ()  # x, y, z
    channels: int = 1
    spacing_mm: tuple[float | None, ...] = ()  # x, y, z; None where the file does not state it
    orientation: str = ""  # letters of the patient's sides to which x, y and z run
    oblique_degrees: float = 0.0  # the largest angle between an axis and the patient's
    slice_axis: str = ""  # array axis across which volumes are cut
    plane: str = ""  # of those slices
    dtype: str = ""
    value_range: tuple[float, ...] = ()  # smallest, percentiles 0.5, 50 and 99.5, largest
    modality: str = ""
    modality_source: str = ""
    labels: dict[int, dict[str, float]] | None = None  # of the mask: voxels, slices, ml
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns the description as text."""
        rows = [("format", self.format)]
        if not self.refused:
            rows += self._rows()
        rows += [("note", note) for note in self.notes]
        rows += [("warning", line) for line in self.warnings]
        rows += [("refused", self.refused)] if self.refused else []
        return [self.path, *(f"  {name + ':':12} {text}" for name, text in rows)]

    def _rows(self) -> list[tuple[str, str]]:
        low, *percentiles, high = (f"{value:.6g}" for value in self.value_range)
        colours = f", {self.channels} colours" if self.channels > 1 else ""
        rows = [
            ("size", " x ".join(map(str, self.size)) + f" (x, y, z){colours}"),
            ("spacing", self.spacing_text()),
            ("orientation", self.orientation_text()),
            ("slices", f"{self.slices} across {self.slice_axis} ({self.plane or 'as stored'})"),
            ("values", f"{self.dtype}, {low} to {high}"),
            ("percentiles", f"{', '.join(percentiles)} (0.5, 50, 99.5)"),
            ("modality", f"{self.modality or 'not known'} ({self.modality_source})"),
        ]
        for label, found in (self.labels or {}).items():
            volume = f", {found['ml']:.4g} ml" if "ml" in found else ""
            slices = f" on {found['slices']} slices" if self.slices > 1 else ""
            rows.append(("label", f"{label}: {found['voxels']} voxels{slices}{volume}"))
        return rows

    @property
    def slices(self) -> int:
        return self.size["xyz".index(self.slice_axis)]

    def spacing_text(self) -> str:
        stated = [step for step in self.spacing_mm if step is not None]
        if not stated:
            return "not stated: results are in pixels"
        text = " x ".join("?" if step is None else f"{step:.4g}" for step in self.spacing_mm)
        if len(stated) == 3 or (self.slices == 1 and len(stated) == 2):
            return f"{text} mm"
        return f"{text} mm, not stated for all axes: results are in pixels"

    def orientation_text(self) -> str:
        if not self.orientation:
            return "not stated"
        tilt = f", oblique by {self.oblique_degrees:.1f} degrees" if self.oblique_degrees else ""
        words = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}
        sides = zip("xyz", self.orientation, strict=True)
        runs = ", ".join(f"{axis} to the {words[side]}" for axis, side in sides)
        return f"{self.orientation} ({runs}{tilt})"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def describe(path: str, mask: str | None = None, modality: str | None = None) -> "Inspected":
    """Reads a scan and, if given, its mask as every command does; never raises UserError.

    Args:
      path: as `read_scan` takes it.
      mask: as `read_mask` takes it.
      modality: as the user would give it; by default a DICOM file's own, or a guess.
    """
    format = format_of(path)
    try:
        scan = read_scan(path)
    except UserError as error:
        return Inspected(Description(path, format, refused=str(error)))
    description = _described(scan, path, format, modality)
    if mask is None:
        return Inspected(description, scan)
    try:
        found = read_mask_scan(mask, scan)
    except UserError as error:
        return Inspected(dataclasses.replace(description, refused=str(error)), scan)
    counted, notes = _count_labels(found.array, scan), notes_of_pair(scan, found)
    description = dataclasses.replace(description, labels=counted, notes=notes)
    return Inspected(description, scan, found.array)


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A description and what it is of, for the picture."""

    description: Description
    scan: Scan | None = None
    labels: np.ndarray | None = None


def _described(scan: Scan, path: str, format: str, modality: str | None) -> Description:
    axis = slice_axis(scan)
    letters, plane, tilt = orientation(scan, axis)
    spacing = tuple(float(s) if math.isfinite(s) else None for s in scan.spacing[::-1])
    low, high = float(scan.array.min()), float(scan.array.max())
    percentiles = np.percentile(scan.array, PERCENTILES).tolist()
    if not modality and format.startswith("DICOM") and (found := dicom.dicom_modality(path)):
        modality, source = found, "the file's DICOM tag"
    elif modality:
        source = "as given"
    else:
        modality, source = _guess(scan.array, low, high)
    warnings = doubts(scan.array, modality, recipe := get_recipe(DEFAULT_RECIPE))
    if low == high:
        warnings.append(f"datasets.build refuses a constant image ({low:g})")
    elif scan.array.dtype != np.uint8:
        try:
            rule_of(modality).limits(scan.array, recipe, None)
        except UserError as error:
            warnings.append(f"datasets.build and predict refuse its values: {error}")
    if None in spacing and scan.array.shape[axis] > 1:
        warnings.append("medsam_jax.evaluate refuses a volume without spacing: scores are in mm")
    return Description(
        path,
        format,
        size=scan.array.shape[2::-1],
        channels=scan.array.shape[3] if scan.array.ndim == 4 else 1,
        spacing_mm=spacing,
        orientation=letters,
        oblique_degrees=tilt,
        slice_axis="zyx"[axis],
        plane=plane,
        dtype=str(scan.array.dtype),
        value_range=(low, *percentiles, high),
        modality=modality,
        modality_source=source,
        notes=scan.notes,
        warnings=tuple(warnings),
    )


def orientation(scan: Scan, axis: int) -> tuple[str, str, float]:
    """Returns the sides to which x, y, z run, the plane of slices, and the largest tilt.

    Such as "LPS", "axial" for slices across the array axis `axis`, and the largest angle between an
    axis and the patient's in degrees. Empty without geometry.
    """
    if scan.affine is None:
        return "", "", 0.0
    direction = np.reshape(scan.affine[2], (3, 3))  # columns: x, y, z of the file
    # Each axis gets a side of its own: in a scan turned by 45 degrees two would share one.
    rest, letters = np.abs(direction).copy(), [""] * 3
    sides = [0] * 3
    for _ in range(3):
        side, column = np.unravel_index(np.argmax(rest), (3, 3))
        positive, negative = "LPS"[side], "RAI"[side]
        letters[column] = positive if direction[side, column] > 0 else negative
        sides[column] = int(side)
        rest[side], rest[:, column] = -1, -1
    cosines = [abs(direction[side, column]) for column, side in enumerate(sides)]
    tilt = math.degrees(math.acos(min(1.0, min(cosines))))
    return "".join(letters), _PLANES[sides[2 - axis]], tilt if tilt > 0.05 else 0.0


def _guess(array: np.ndarray, low: float, high: float) -> tuple[str, str]:
    """Returns a modality, or "", and what it is guessed from."""
    if array.ndim == 4:
        return "", "colours: a photograph, microscopy or a screen picture"
    if low <= -500:
        return "CT", f"a guess: values down to {low:g} look like HU; give --modality CT"
    if np.issubdtype(array.dtype, np.integer) and low == 0 and high < MASK_VALUES:
        return "", "few whole values: this looks like a mask"
    return "", "the file does not say; give --modality"


def _count_labels(labels: np.ndarray, scan: Scan) -> dict[int, dict[str, float]]:
    axis = slice_axis(scan)
    voxel = float(np.prod(scan.spacing)) / 1000  # ml
    counted = {}
    for label in np.unique(labels[labels > 0]).tolist():
        found = labels == label
        voxels = int(np.count_nonzero(found))
        others = tuple(other for other in range(3) if other != axis)
        counted[label] = {"voxels": voxels, "slices": int(found.any(axis=others).sum())}
        if math.isfinite(voxel) and labels.shape[axis] > 1:
            counted[label]["ml"] = voxels * voxel
    return counted


def format_of(path: str) -> str:
    """Returns the format that the first bytes of a file show, whatever its name says."""
    file = pathlib.Path(split_series(path)[0])
    if file.is_dir():
        return "DICOM series"
    try:
        found = formats.identify(file)
    except UserError:
        return "damaged gzip"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return (found.name or UNKNOWN) + (", compressed by gzip" if found.is_gzipped else "")


def find_scans(path: str) -> tuple[list[str], list[str]]:
    """Returns the scans that a path names, and a line for each file left out that could be one.

    A file and `FOLDER#SERIES_UID` are one scan. In a folder, those below it count too. A DICOM
    series is one scan, and so is a DICOM file that belongs to none.

    Raises:
      UserError: nothing there, or no scan in a folder.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        return [path], []
    contents = search(root)
    scans = [str(file) for file in contents.files]
    for folder, files in contents.dicom.items():
        series = dicom.list_series(folder)
        scans += [f"{folder}#{uid}" if len(series) > 1 else str(folder) for uid in series]
        used = {pathlib.Path(name).name for names in series.values() for name in names}
        scans += [str(file) for file in files if file.name not in used]
    if not scans:
        left_out = "; ".join(contents.left_out[:3]) or "nothing that could be one"
        raise UserError(f"{path}: no scan in this folder ({left_out})")
    return sorted(scans), contents.left_out


def picture_names(scans: list[str]) -> dict[str, str]:
    """Returns a file name for each scan's picture: stems, with a number where they are the same."""
    names: dict[str, str] = {}
    taken = set()
    for scan in scans:
        folder, uid = split_series(scan)
        base = stem(folder) + (f"_{uid}" if uid else "")
        candidates = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(2)))
        name = next(name for name in candidates if name.lower() not in taken)
        taken.add(name.lower())
        names[scan] = f"{name}.png"
    return names


def summary(descriptions: list[Description], left_out: list[str]) -> list[str]:
    """Returns what the scans of a folder have in common: sizes, spacings, orientations, types."""
    read = [one for one in descriptions if not one.refused]
    lines = [f"{len(descriptions)} scans, {len(descriptions) - len(read)} refused"]
    lines += [f"  left out:    {line}" for line in left_out[:20]]
    if len(left_out) > 20:
        lines.append(f"  left out:    {len(left_out) - 20} further files")
    if not read:
        return lines
    sizes = np.array([one.size for one in read])
    lines.append("  size:        " + _range(sizes) + " (x, y, z)")
    steps = [one.spacing_mm for one in read if None not in one.spacing_mm]
    if steps:
        median = " x ".join(f"{step:.4g}" for step in np.median(steps, axis=0))
        lines.append(f"  spacing:     {_range(np.array(steps))} mm, median {median}")
    if len(steps) < len(read):
        lines.append(f"  no spacing:  {len(read) - len(steps)}")
    for title, field in (("orientation", "orientation"), ("slices", "plane"), ("type", "dtype")):
        lines.append(f"  {title + ':':12} {_counts([getattr(one, field) for one in read])}")
    lines.append(f"  modality:    {_counts([one.modality for one in read])}")
    return lines


def _range(values: np.ndarray) -> str:
    ends = zip(values.min(axis=0).tolist(), values.max(axis=0).tolist(), strict=True)
    return " x ".join(f"{a:.4g}" if a == b else f"{a:.4g}..{b:.4g}" for a, b in ends)


def _counts(values: list[str]) -> str:
    counted = {value: values.count(value) for value in sorted(set(values))}
    return ", ".join(f"{value or 'not stated'} {count}" for value, count in counted.items())


def other_folder(path: str) -> str | None:
    """Returns one line for a folder that is known not to hold scans: a checkpoint."""
    if (pathlib.Path(path) / "model.json").is_file():
        return f"{path}: is a checkpoint directory, not scans; hand it to --checkpoint"
    return None
