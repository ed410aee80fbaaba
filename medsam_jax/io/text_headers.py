"""Reads NRRD and MetaImage with ITK, after reading their text headers.

ITK takes a spacing of 1 mm where the header has none, ignores units, and says little of a data file
that is missing, short or damaged.
"""

import dataclasses
import math
import os
import pathlib
import re
import sys
import zlib

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io import itk
from medsam_jax.io.geometry import Scan

_MOST_HEADER = 1 << 20  # bytes
_BITS = {"char": 8, "int8": 8, "short": 16, "int16": 16, "int": 32, "int32": 32, "long": 32}
_BITS |= {"int64": 64, "long long": 64, "longlong": 64, "long_long": 64, "float": 32, "double": 64}
_TO_MM = {"": 1.0, "mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001, "nm": 1e-6}
_LONG_UNITS = {"millimeter": "mm", "centimeter": "cm", "meter": "m", "micron": "um"}
_LONG_UNITS |= {"micrometer": "um", "nanometer": "nm", "millimetre": "mm", "micrometre": "um"}
_COLOUR_KINDS = {"rgb-color": "RGB", "3-color": "RGB", "rgba-color": "RGBA", "4-color": "RGBA"}
_PLACE = ("transformmatrix", "rotation", "orientation", "offset", "position", "origin")
_PLACE += ("centerofrotation", "elementspacing", "elementsize")
_FARTHEST = 1e9  # mm
_SPACE_KINDS = ("domain", "space", "none", "???", "")


@dataclasses.dataclass(frozen=True)
class _Data:
    """Size of the voxels, and the files in which they are."""

    promised: int  # bytes without compression
    is_compressed: bool
    skipped: int  # bytes before the voxels, in each file
    files: tuple[pathlib.Path, ...]
    stored: int = 0  # bytes of compressed data, as far as the header says

    def check(self, path: str) -> None:
        """Raises UserError for a data file that is missing, or if all are shorter than needed."""
        for file in self.files:
            if not file.is_file():
                raise UserError(
                    f"{path}: its data file {file.name} is missing; copy it beside the header"
                )
        found = sum(max(file.stat().st_size - self.skipped, 0) for file in self.files)
        needed = self.promised
        if self.is_compressed:
            needed = self.promised // 1100  # the most that deflate can save
        if found < needed:
            name = self.files[0].name if len(self.files) == 1 else f"{len(self.files)} data files"
            raise UserError(
                f"{path}: cannot be read ({name} truncated: {found} bytes of {needed}); copy it "
                "again"
            )

    def check_deflate(self, path: str) -> None:
        """Raises UserError if compressed data are damaged, which MetaIO prints and returns."""
        found, is_whole = 0, True
        try:
            for file in self.files:
                unpack = zlib.decompressobj()
                with open(file, "rb") as stream:
                    stream.seek(self.skipped)
                    left = self.stored or sys.maxsize
                    while block := stream.read(min(left, 1 << 20)):
                        left -= len(block)
                        found += len(unpack.decompress(block))
                is_whole &= unpack.eof
        except zlib.error as error:
            raise UserError(f"{path}: cannot be read ({error}); copy it again") from None
        if found < self.promised or not is_whole:
            raise UserError(
                f"{path}: cannot be read (truncated or damaged: {found} bytes of {self.promised} "
                "after decompression); copy it again"
            )


def read_nrrd(path: str) -> Scan:
    """Reads a NRRD, attached or detached. Raises UserError; see `read_metaimage`."""
    fields, end = _nrrd_fields(path)
    try:
        sizes = [int(value) for value in fields["sizes"].split()]
        kinds = fields.get("kinds", "").lower().split() or [""] * len(sizes)
        directions = _vectors(fields.get("space directions", ""))
        steps = [float(value) for value in fields.get("spacings", "").split()]
        type_ = fields["type"].lower()
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: the NRRD header is damaged ({error}); write it again") from None
    if directions:
        steps = [math.nan if one is None else math.hypot(*one) for one in directions]
    elif not steps:
        steps = [math.nan] * len(sizes)
    bits = _BITS.get(_unsigned(type_))
    if len(steps) != len(sizes) or len(kinds) != len(sizes) or bits is None:
        raise UserError(
            f"{path}: the NRRD header is damaged ({len(sizes)} sizes, {len(steps)} spacings, type "
            f"{type_}); write it again"
        )
    data = _nrrd_data(path, fields, end, math.prod(sizes) * bits // 8)
    if data:
        data.check(path)
    is_space = [kind in _SPACE_KINDS for kind in kinds]
    if directions and not fields.get("kinds"):
        is_space = [one is not None for one in directions]
    colours = next((_COLOUR_KINDS[kind] for kind in kinds if kind in _COLOUR_KINDS), "")
    for kind, size in zip(kinds, sizes, strict=True):
        if size > 1 and kind not in (*_SPACE_KINDS, *_COLOUR_KINDS, "vector"):
            raise UserError(
                f"{path}: has {size} values per voxel of the kind {kind}, which are no colours; "
                "save each as a file of its own"
            )
    stated = [step for step, in_space in zip(steps, is_space, strict=True) if in_space]
    _check_steps(path, stated)
    _check_numbers(path, fields, ("space directions", "space origin", "axis mins", "axis maxs"))
    scan = itk.read_sitk(path, "NrrdImageIO", colours)
    units = re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", "")))
    return _with_units(_with_spacing(scan, stated), units)


def read_metaimage(path: str) -> Scan:
    """Reads a MetaImage, one file (`.mha`) or two (`.mhd` and its data).

    Raises:
      UserError: a damaged header, a data file that is missing or short, a spacing that is not above
        0. A spacing that the header does not state becomes NaN.
    """
    fields, end = _meta_fields(path)
    try:
        sizes = [int(value) for value in fields["dimsize"].split()]
        if int(fields["ndims"]) != len(sizes):
            raise ValueError(f"NDims is {fields['ndims']}, DimSize {fields['dimsize']}")
        stated = fields.get("elementspacing", fields.get("elementsize", ""))
        steps = [float(value) for value in stated.split()] or [math.nan] * len(sizes)
        type_ = fields["elementtype"].lower().removeprefix("met_").removesuffix("_array")
        channels = int(fields.get("elementnumberofchannels", "1"))
        name = fields["elementdatafile"]
        skipped = max(int(fields.get("headersize", "0")), 0)
        stored = max(int(fields.get("compresseddatasize", "0")), 0)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path}: the MetaImage header is damaged ({error}); write it again"
        ) from None
    bits = _BITS.get(type_.removeprefix("u"))
    if bits is None or not sizes or min(sizes) < 1 or channels < 1:
        raise UserError(
            f"{path}: the MetaImage header is damaged (size {sizes}, type {type_}); write it again"
        )
    _check_steps(path, steps)
    _check_numbers(path, fields, _PLACE)
    files = _data_files(path, name, end, fields["rest"])
    if files:
        promised = math.prod(sizes) * channels * bits // 8
        is_compressed = fields.get("compresseddata", "").lower().startswith("t")
        is_local = name.upper() == "LOCAL"
        data = _Data(promised, is_compressed, end if is_local else skipped, files, stored)
        data.check(path)
        if is_compressed:
            data.check_deflate(path)
    scan = _with_spacing(itk.read_sitk(path, "MetaImageIO"), steps)
    return _with_units(scan, [fields.get("distanceunits", "").lower()])


def _check_steps(path: str, steps: list[float]) -> None:
    """Raises UserError unless each spacing is above 0 or not known."""
    if any(step <= 0 or math.isinf(step) for step in steps):
        found = " x ".join(f"{step:g}" for step in steps)
        raise UserError(f"{path}: the header says {found} mm a voxel; write its spacing")


def _check_numbers(path: str, fields: dict[str, str], names: tuple[str, ...]) -> None:
    """Raises UserError for a place that is too far to be true; ITK does not return from some."""
    for name in names:
        for word in re.findall(r"[^\s,()]+", fields.get(name, "")):
            try:
                is_place = word.lower() == "none" or abs(float(word)) < _FARTHEST
            except ValueError:
                is_place = False
            if not is_place:
                raise UserError(f"{path}: {name} in the header has {word}; write the file again")


def _with_spacing(scan: Scan, steps: list[float]) -> Scan:
    """Returns the scan with the stated spacing (x, y, z): NaN where the header has none.

    Without a spacing there is no position either.
    """
    known = [*steps[:3], *[math.nan] * (3 - len(steps))][::-1]
    spacing = tuple(
        value if math.isfinite(step) else math.nan
        for value, step in zip(scan.spacing, known, strict=True)
    )
    if all(math.isfinite(step) for step in steps[:3]):
        return dataclasses.replace(scan, spacing=spacing)
    note = "The header states no spacing for all axes: lengths are in voxels, position is unknown."
    return dataclasses.replace(scan, spacing=spacing, affine=None, notes=(*scan.notes, note))


def _with_units(scan: Scan, units: list[str]) -> Scan:
    """Returns the scan in mm, from the units of its axes. Raises UserError for several ones."""
    named = {_LONG_UNITS.get(unit.strip().lower().rstrip("s"), unit.strip()) for unit in units}
    named -= {""}
    if not named <= {"mm"} and (len(named) > 1 or not named <= set(_TO_MM)):
        raise UserError(f"{scan.path}: the units are {sorted(named)}; write the spacing in mm")
    factor = _TO_MM[next(iter(named), "")]
    if factor == 1.0 or scan.affine is None:
        return scan
    origin, spacing, direction = scan.affine
    scaled = tuple(tuple(value * factor for value in part) for part in (origin, spacing))
    return dataclasses.replace(
        scan,
        spacing=tuple(value * factor for value in scan.spacing),
        affine=(*scaled, direction),
        notes=(*scan.notes, f"The header's unit {next(iter(named))} was converted to mm."),
    )


def _nrrd_fields(path: str) -> tuple[dict[str, str], int]:
    """Returns the header's fields by lower-case name, and the position of the data."""
    with open(path, "rb") as file:
        text = file.read(_MOST_HEADER)
    ended = re.search(rb"\r?\n\r?\n", text)
    end = ended.end() if ended else len(text)
    fields: dict[str, str] = {}
    lines = text[:end].decode("utf-8", "replace").splitlines()[1:]
    for number, line in enumerate(lines):
        name, colon, value = line.partition(":")
        if line.startswith("#") or not colon or value.startswith("="):
            continue
        name = name.strip().lower()
        fields["data file" if name == "datafile" else name] = value.strip()
        if name in ("data file", "datafile") and value.split()[:1] == ["LIST"]:
            fields["listed"] = "\n".join(lines[number + 1 :])
    return fields, end


def _nrrd_data(path: str, fields: dict[str, str], end: int, promised: int) -> _Data | None:
    """Returns the data of a NRRD; None where its size in the file cannot be known beforehand."""
    encoding = fields.get("encoding", "raw").lower()
    name = fields.get("data file", "LOCAL")
    files = _data_files(path, name, end, fields.get("listed", ""))
    skips = fields.get("line skip", "0"), fields.get("byte skip", "0")
    if not files:
        return None
    if encoding not in ("raw", "gzip", "gz") or set(skips) != {"0"}:
        return _Data(0, True, 0, files)
    return _Data(promised, encoding != "raw", end if name == "LOCAL" else 0, files)


def _unsigned(type_: str) -> str:
    """Returns a NRRD type without what does not change its size: "unsigned short int" is short."""
    words = [word for word in type_.split() if word not in ("unsigned", "signed")]
    if len(words) > 1 and words[-1] == "int":
        words.pop()
    return " ".join(words).removeprefix("u").removesuffix("_t")


def _vectors(text: str) -> list[np.ndarray | None]:
    """Returns the vectors of NRRD's "(1,0,0) (0,1,0) none"; None for none."""
    found = re.findall(r"\(([^)]*)\)|(none)", text, re.IGNORECASE)
    return [
        None if none else np.array([float(v) for v in inner.split(",")]) for inner, none in found
    ]


def _meta_fields(path: str) -> tuple[dict[str, str], int]:
    """Returns the header's fields by lower-case name, and the position of the data."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        text = file.read(_MOST_HEADER)
    end = 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        name, _, value = line.decode("utf-8", "replace").partition("=")
        name, value = name.strip().lower(), value.strip()
        if fields.setdefault(name, value) != value:
            raise UserError(f"{path}: its header has {name} twice; write it again")
        if "elementdatafile" in fields:
            break
    fields["rest"] = text[end:].decode("utf-8", "replace") if end < len(text) else ""
    return fields, end


def _data_files(path: str, name: str, end: int, rest: str) -> tuple[pathlib.Path, ...]:
    """Returns the files with the voxels: the file itself, another, a list or a numbered pattern."""
    header = pathlib.Path(path)
    words = name.split()
    if name.upper() == "LOCAL":
        return (header,)
    if words and words[0].upper() == "LIST":
        names = [line.strip() for line in rest.splitlines() if line.strip()]
    elif len(words) >= 3 and "%" in words[0]:
        first, last = int(words[1]), int(words[2])
        step = int(words[3]) if len(words) > 3 else 1
        names = [words[0] % number for number in range(first, last + 1, step or 1)]
    else:
        names = [name]
    return tuple(header.parent / os.path.expanduser(one) for one in names)
