"""Reads the pixels of DICOM frames and rescales each by its own slope and intercept."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.dicom_decode import decode
from medsam_jax.io.dicom_headers import EXPORT, Header

_GREY = ("MONOCHROME1", "MONOCHROME2")
_PHOTOMETRIC = (*_GREY, "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422")
_PHOTOMETRIC += ("YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")
_BIG_ENDIAN = "1.2.840.10008.1.2.2"


@dataclasses.dataclass(frozen=True)
class Frame:
    """One slice: a file, or a frame of a multi-frame file, with its place in the patient.

    position: of the first pixel's centre, mm, LPS; None if not stated.
    axes: direction of a row and of a column, [2, 3]; None if not stated.
    spacing: mm between rows and between columns; None if not stated.
    traits: values by which frames at one position may differ, by keyword.
    """

    header: Header
    index: int
    position: tuple[float, ...] | None
    axes: tuple[float, ...] | None
    spacing: tuple[float, float] | None
    slope: float
    intercept: float
    traits: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        many = self.header.frame_count > 1
        return f"{self.header.name} frame {self.index + 1}" if many else self.header.name


def read_pixels(frames: Sequence[Frame]) -> tuple[np.ndarray, list[str]]:
    """Returns the rescaled pixels of frames in their order, [Z, Y, X] or [Z, Y, X, 3], and notes.

    Integers stay integers where every slope and intercept is whole.

    Raises:
      UserError: pixels that are cut, of a kind that is not read, or cannot be decompressed.
    """
    cached: tuple[str, np.ndarray | None] = ("", None)
    planes, padded = [], 0
    for frame in frames:
        if cached[0] != frame.header.file:
            cached = (frame.header.file, stored_pixels(frame.header))
        plane, replaced = _without_padding(cached[1][frame.index], frame.header)
        planes.append(_rescale(plane, frame))
        padded += replaced
    volume = np.empty((len(planes), *planes[0].shape), _common_type(planes))
    for target, plane in zip(volume, planes, strict=True):
        target[...] = plane
    note = f"{padded} pixels of padding, brighter than any other, were set to the lowest value."
    return volume, [note] if padded else []


def _without_padding(plane: np.ndarray, header: Header) -> tuple[np.ndarray, int]:
    """Returns a plane, in which padding that is brighter than all else is dark, and its count."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int) or plane.ndim == 3 or plane.dtype.kind == "f":
        return plane, 0
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        value = _inverted(value, plane.dtype, header)
    if plane.max() != value or plane.min() == value:
        return plane, 0
    is_padding = plane == value
    return np.where(is_padding, plane.min(), plane), int(np.count_nonzero(is_padding))


def _inverted(values: Any, kind: np.dtype, header: Header) -> Any:
    """Returns MONOCHROME1, in which 0 is white, as values in which 0 is black."""
    stored = header.integer("BitsStored", kind.itemsize * 8)
    return (-1 if kind.kind == "i" else kind.type(2**stored - 1)) - values


def stored_pixels(header: Header) -> np.ndarray:
    """Returns the stored values of all frames of a file, [frames, Y, X] or colours [..., 3]."""
    _check_kind(header)
    photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    is_colour = photometric not in _GREY
    if header.length < 0:
        values = decode(header)
    else:
        values = _plain(header, photometric)
        if photometric.startswith(("YBR", "PALETTE")):
            values = decode(header)
    if is_colour != (values.ndim == 4):
        raise UserError(
            f"{header.file}: {photometric} with {header.get('SamplesPerPixel')} values "
            f"a pixel is not read; {EXPORT}, as grey or RGB"
        )
    return values if is_colour else _used_bits(values, header)


def _plain(header: Header, photometric: str) -> np.ndarray:
    """Returns uncompressed pixels; checks that all are there."""
    rows, columns = header.shape
    samples, bits = header.integer("SamplesPerPixel", 1), header.integer("BitsAllocated")
    per_pixel = 2 if photometric == "YBR_FULL_422" else samples
    expected = header.frame_count * rows * columns * per_pixel * bits // 8
    if header.length < expected:
        raise UserError(
            f"{header.file}: its pixels are cut: {header.length} bytes for {header.frame_count} x "
            f"{rows} x {columns} pixels of {per_pixel * bits} bits; {EXPORT}"
        )
    if header.inflated is None and header.start + expected > os.path.getsize(header.file):
        raise UserError(f"{header.file}: the file is cut within its pixels; {EXPORT}")
    row = columns * per_pixel * bits // 8
    if header.length > expected + max(row, 1):
        raise UserError(
            f"{header.file}: has {header.length} bytes of pixels, more than {header.frame_count} x "
            f"{rows} x {columns} pixels of {per_pixel * bits} bits; its size or number of frames "
            f"is wrong; {EXPORT}"
        )
    dtype = _dtype(header)
    count = expected // dtype.itemsize
    if header.inflated is not None:
        values = np.frombuffer(header.inflated, dtype, count, offset=header.start)
    else:
        values = np.fromfile(header.file, dtype, count, offset=header.start)
    if per_pixel != samples:
        return values
    if header.syntax == _BIG_ENDIAN and bits == 8 and _is_words(header):
        values = np.fromfile(header.file, ">u2", (expected + 1) // 2, offset=header.start)
        values = values.astype("<u2").view(dtype)[:count]
    shape = (header.frame_count, rows, columns)
    if samples == 1:
        return values.reshape(shape).astype(dtype.newbyteorder("="), copy=False)
    if header.integer("PlanarConfiguration"):
        return np.moveaxis(values.reshape(header.frame_count, samples, rows, columns), 1, -1)
    return values.reshape(*shape, samples)


def _is_words(header: Header) -> bool:
    """Returns whether bytes are stored as pairs in words, which swaps them in big-endian files."""
    with open(header.file, "rb") as file:
        file.seek(header.start - 8)
        return file.read(2) == b"OW"


def _dtype(header: Header) -> np.dtype:
    size = header.integer("BitsAllocated") // 8
    order = ">" if header.syntax == _BIG_ENDIAN else "<"
    if header.pixels != "PixelData":
        return np.dtype(f"{order}f{size}")
    return np.dtype(f"{order}{'i' if header.integer('PixelRepresentation') else 'u'}{size}")


def _used_bits(values: np.ndarray, header: Header) -> np.ndarray:
    """Takes off bits that are not part of the value, such as overlays; white is high."""
    if values.dtype.kind == "f":
        return values
    allocated = values.dtype.itemsize * 8
    stored = min(header.integer("BitsStored", allocated), allocated)
    high = header.integer("HighBit", stored - 1)
    if stored < allocated and header.length >= 0 and stored - 1 <= high < allocated:
        values = (values << (allocated - 1 - high)) >> (allocated - stored)
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        values = _inverted(values, values.dtype, header)
    return values


def _rescale(plane: np.ndarray, frame: Frame) -> np.ndarray:
    """Applies slope and intercept; whole ones give the smallest integer type that holds all."""
    if (tables := frame.header.get("ModalityLUTSequence")) and plane.ndim == 2:
        return _look_up(plane, tables[0])
    slope, intercept = frame.slope, frame.intercept
    if (slope, intercept) == (1.0, 0.0) or plane.ndim == 3:
        return plane
    if plane.dtype.kind == "f" or slope != round(slope) or intercept != round(intercept):
        return (plane * np.float64(slope) + intercept).astype(np.float32)
    kind = _signed_type([int(edge) * int(slope) + int(intercept) for edge in _range(plane)])
    return plane.astype(kind) * kind.type(slope) + kind.type(intercept)


def _look_up(plane: np.ndarray, table: Any) -> np.ndarray:
    """Applies a modality lookup table; values beyond its ends take those of the ends."""
    count, first, bits = (int(value) for value in table.LUTDescriptor)
    data = table.LUTData
    content = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.array(data)
    content = content[: count or 1 << 16].astype(np.uint8 if bits <= 8 else np.uint16)
    return content[np.clip(plane.astype(np.int64) - first, 0, len(content) - 1)]


def _range(plane: np.ndarray) -> tuple[int, int]:
    return int(plane.min()), int(plane.max())


def _signed_type(values: Sequence[int]) -> np.dtype:
    """Returns the smallest of the signed types from 16 bits that holds some values."""
    for kind in map(np.dtype, (np.int16, np.int32)):
        if np.iinfo(kind).min <= min(values) and max(values) <= np.iinfo(kind).max:
            return kind
    return np.dtype(np.int64)


def _common_type(planes: Sequence[np.ndarray]) -> np.dtype:
    """Returns a type that holds the values of all planes: their own if they have the same."""
    kinds = {plane.dtype for plane in planes}
    if len(kinds) == 1 or any(kind.kind == "f" for kind in kinds):
        return np.result_type(*kinds)
    return _signed_type([edge for plane in planes for edge in _range(plane)])


def _check_kind(header: Header) -> None:
    """Refuses pixels of a kind that is not read here."""
    from pydicom.uid import UID

    bits, samples = header.integer("BitsAllocated"), header.integer("SamplesPerPixel", 1)
    allowed = (8, 16, 32) if header.pixels == "PixelData" else (32, 64)
    stored = header.integer("BitsStored", bits)
    if bits not in allowed or not 0 < stored <= bits or samples not in (1, 3):
        raise UserError(
            f"{header.file}: has {samples} values a pixel of {stored} in {bits} bits, which is not "
            "read; export it with 8 or 16 bits"
        )
    photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    if photometric not in _PHOTOMETRIC:
        raise UserError(
            f"{header.file}: its pixels are {photometric} of {bits} bits, which is not read; "
            "export it as grey (MONOCHROME2) or RGB"
        )
    if not min(header.shape):
        raise UserError(
            f"{header.file}: has {header.shape[0]} x {header.shape[1]} pixels; {EXPORT}"
        )
    name = UID(header.syntax).name
    if header.length < 0 and any(word in name for word in ("MPEG", "HEVC", "SMPTE")):
        raise UserError(f"{header.file}: is a video ({name}); export its frames uncompressed")
