"""Reads the pixels of DICOM frames and rescales each by its own slope and intercept."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.dicom_headers import EXPORT, Header

_GREY = ("MONOCHROME1", "MONOCHROME2")


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

    @property
    def name(self) -> str:
        many = self.header.frame_count > 1
        return f"{self.header.name} frame {self.index + 1}" if many else self.header.name


def read_pixels(frames: Sequence[Frame]) -> np.ndarray:
    """Returns the rescaled pixels of frames in their order, [Z, Y, X] or [Z, Y, X, 3].

    Integers stay integers where every slope and intercept is whole.

    Raises:
      UserError: pixels that are cut, of a kind that is not read, or cannot be decompressed.
    """
    cached: tuple[str, np.ndarray | None] = ("", None)
    planes = []
    for frame in frames:
        if cached[0] != frame.header.file:
            cached = (frame.header.file, stored_pixels(frame.header))
        planes.append(_rescale(cached[1][frame.index], frame))
    volume = np.empty((len(planes), *planes[0].shape), _common_type(planes))
    for target, plane in zip(volume, planes, strict=True):
        target[...] = plane
    return volume


def stored_pixels(header: Header) -> np.ndarray:
    """Returns the stored values of all frames of a file, [frames, Y, X] or [frames, Y, X, 3]."""
    _check_kind(header)
    rows, columns = header.shape
    samples = header.integer("SamplesPerPixel", 1)
    bits = header.integer("BitsAllocated")
    expected = header.frame_count * rows * columns * samples * bits // 8
    if header.length != expected + expected % 2 and header.length < expected:
        raise UserError(
            f"{header.file}: its pixels are cut: {header.length} bytes for {header.frame_count} x "
            f"{rows} x {columns} pixels of {bits} bits; {EXPORT}"
        )
    if header.start + expected > os.path.getsize(header.file):
        raise UserError(f"{header.file}: the file is cut within its pixels; {EXPORT}")
    dtype = _dtype(header)
    values = np.fromfile(header.file, dtype, expected // dtype.itemsize, offset=header.start)
    shape = (header.frame_count, rows, columns)
    values = values.reshape(shape if samples == 1 else (*shape, samples))
    return _used_bits(values, header) if samples == 1 else values


def _dtype(header: Header) -> np.dtype:
    size = header.integer("BitsAllocated") // 8
    if header.pixels != "PixelData":
        return np.dtype(f"<f{size}")
    return np.dtype(f"<{'i' if header.integer('PixelRepresentation') else 'u'}{size}")


def _used_bits(values: np.ndarray, header: Header) -> np.ndarray:
    """Takes off bits that are not part of the value, such as overlays of older files."""
    if values.dtype.kind == "f":
        return values
    allocated = values.dtype.itemsize * 8
    stored = header.integer("BitsStored", allocated)
    high = header.integer("HighBit", stored - 1)
    if stored < allocated:
        values = (values << (allocated - 1 - high)) >> (allocated - stored)
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        values = (-1 if values.dtype.kind == "i" else values.dtype.type(2**stored - 1)) - values
    return values


def _rescale(plane: np.ndarray, frame: Frame) -> np.ndarray:
    """Applies slope and intercept; whole ones give the smallest integer type that holds all."""
    slope, intercept = frame.slope, frame.intercept
    if (slope, intercept) == (1.0, 0.0) or plane.ndim == 3:
        return plane
    if plane.dtype.kind == "f" or slope != round(slope) or intercept != round(intercept):
        return (plane * np.float64(slope) + intercept).astype(np.float32)
    kind = _signed_type([int(edge) * int(slope) + int(intercept) for edge in _range(plane)])
    return plane.astype(kind) * kind.type(slope) + kind.type(intercept)


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
    bits, samples = header.integer("BitsAllocated"), header.integer("SamplesPerPixel", 1)
    allowed = (8, 16, 32) if header.pixels == "PixelData" else (32, 64)
    stored = header.integer("BitsStored", bits)
    if bits not in allowed or not 0 < stored <= bits or samples not in (1, 3):
        raise UserError(
            f"{header.file}: has {samples} values a pixel of {stored} in {bits} bits, which is not "
            "read; export it with 8 or 16 bits"
        )
