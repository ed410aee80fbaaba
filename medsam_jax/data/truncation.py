"""Finds cut-off NIfTI files, which ITK reads without a word, their rest filled with zeros."""

import gzip
import math
import pathlib
import struct
import zlib

from medsam_jax.errors import UserError


def check_nifti(path: pathlib.Path) -> None:
    """Raises UserError where a `.nii` or `.nii.gz` holds fewer bytes than its header promises.

    For a compressed file the size in its last four bytes is compared first; only where that
    disagrees (cut off, or written in several gzip members) is the whole file decompressed.
    """
    compressed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if compressed else open(path, "rb") as file:
            needed = _promised_bytes(file.read(544))
        if needed is None:
            return  # no NIfTI header: the reader will say so
        if not compressed:
            found = path.stat().st_size
        else:
            found = _recorded_size(path)
            if found != needed % 2**32:
                found = _decompressed_size(path)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file again") from None
    if found < needed:
        raise UserError(
            f"{path}: cannot be read (truncated: {found} bytes of {needed}); copy the file again"
        )


def _promised_bytes(header: bytes) -> int | None:
    """Bytes up to the last voxel by a NIfTI-1 or -2 header; None for anything else."""
    for order in "<>":
        if len(header) >= 348 and struct.unpack(f"{order}i", header[:4])[0] == 348:
            dim = struct.unpack(f"{order}8h", header[40:56])
            bits = struct.unpack(f"{order}h", header[72:74])[0]
            offset = struct.unpack(f"{order}f", header[108:112])[0]
            break
        if len(header) >= 540 and struct.unpack(f"{order}i", header[:4])[0] == 540:
            dim = struct.unpack(f"{order}8q", header[16:80])
            bits = struct.unpack(f"{order}h", header[14:16])[0]
            offset = struct.unpack(f"{order}q", header[168:176])[0]
            break
    else:
        return None
    return int(offset) + math.prod(dim[1 : 1 + dim[0]]) * bits // 8


def _recorded_size(path: pathlib.Path) -> int:
    with open(path, "rb") as file:
        file.seek(-4, 2)
        return struct.unpack("<I", file.read(4))[0]


def _decompressed_size(path: pathlib.Path) -> int:
    size = 0
    with gzip.open(path) as file:
        while block := file.read(1 << 22):
            size += len(block)
    return size
