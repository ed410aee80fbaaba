"""Reads MedSAM's `.npz` files."""

import math
import pathlib
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.geometry import Scan
from medsam_jax.io.itk import reason

_MOST_RATIO = 1100  # bytes for each one compressed: the most that deflate saves


def read_npz(path: str, key: str) -> Scan:
    """Reads MedSAM's `.npz`: `imgs` and `gts` [Z, Y, X] or a picture, `spacing` as (x, y, z)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file.files) if hasattr(file, "files") else []
            array = _member(file, key) if key in names else None
            spacing = _member(file, "spacing") if "spacing" in names else None
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as .npz ({reason(error)}); write it again"
        ) from None
    except Exception as error:  # zipfile.BadZipFile and zlib.error share no base class
        raise UserError(f"{path}: damaged .npz ({reason(error)}); write it again") from None
    if array is None:
        is_npz = pathlib.Path(path).suffix.lower() == ".npz"
        remedy = f"store it as {key!r}" if is_npz else "unpack it if it is a zip archive"
        raise UserError(f"{path}: has no array {key!r} (found {', '.join(names[:9])}); {remedy}")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3 and spacing is None):
        array = array[None]
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3):
        raise UserError(f"{path}: {key} has shape {array.shape}; expected [Z, Y, X] or [Y, X, 3]")
    if not array.size:
        raise UserError(f"{path}: {key} has shape {array.shape}, no voxels; write it again")
    array = _as_numbers(array, path, key)
    if spacing is None:
        return Scan(array, (math.nan,) * 3, None, path)
    return _with_spacing(array, spacing, path)


def _member(file: Any, name: str) -> np.ndarray:
    """Reads an array of an archive. Raises ValueError if its header promises more than there is."""
    entry = file.zip.getinfo(f"{name}.npy" if f"{name}.npy" in file.zip.namelist() else name)
    with file.zip.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    promised = math.prod(shape) * dtype.itemsize
    if promised > entry.file_size or entry.file_size > _MOST_RATIO * entry.compress_size + 4096:
        raise ValueError(f"{name} is truncated: {promised} bytes of {shape} in {entry.file_size}")
    return file[name]


def _as_numbers(array: np.ndarray, path: str, key: str) -> np.ndarray:
    """Returns integers or floats of the machine's byte order. Raises UserError for other types."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise UserError(f"{path}: {key} has type {array.dtype}; store integers or floats")
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _with_spacing(array: np.ndarray, spacing: np.ndarray, path: str) -> Scan:
    try:
        xyz = tuple(float(value) for value in np.ravel(spacing))
    except (TypeError, ValueError):
        xyz = ()
    if len(xyz) != 3 or any(value <= 0 or math.isinf(value) for value in xyz):
        found = np.asarray(spacing).tolist()
        raise UserError(f"{path}: has the spacing {found} (x, y, z); store positive mm")
    if not np.isfinite(xyz).all():
        note = "The spacing is not known for all axes; lengths are in voxels."
        return Scan(array, xyz[::-1], None, path, (note,))
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    return Scan(array, xyz[::-1], ((0.0, 0.0, 0.0), xyz, identity), path)
