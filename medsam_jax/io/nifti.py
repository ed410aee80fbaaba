"""Checks NIfTI files for defects that ITK accepts silently: truncation and a spacing of 0."""

import dataclasses
import gzip
import math
import pathlib
import struct
import zlib

from medsam_jax.errors import UserError


def check_nifti(path: pathlib.Path) -> None:
    """Refuses a `.nii` or `.nii.gz` that is shorter than its header states, or has no spacing.

    ITK reads the missing voxels as zeros and a spacing of 0 as 1.

    A compressed file states its size in the last four bytes. The whole file is decompressed only
    if that size disagrees (truncated file, or several gzip members).

    Raises:
      UserError: the message has the file, the header's values and the remedy.
    """
    compressed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if compressed else open(path, "rb") as file:
            header = _Header.parse(file.read(544))
        if header is None:
            return  # the reader reports the error
        header.check_spacing(path)
        needed = header.promised_bytes
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


@dataclasses.dataclass(frozen=True)
class _Header:
    """Fields of a NIfTI-1 or NIfTI-2 header that the checks use."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]  # mm, in the order of `shape`
    bits: int  # per voxel
    offset: int  # of the first voxel, in bytes

    @classmethod
    def parse(cls, header: bytes) -> "_Header | None":
        """Parses a NIfTI-1 or NIfTI-2 header; returns None for other bytes."""
        for order in "<>":

            def field(kind: str, start: int, order: str = order) -> tuple:
                return struct.unpack_from(order + kind, header, start)

            if len(header) >= 348 and field("i", 0)[0] == 348:
                dim, pixdim = field("8h", 40), field("8f", 76)
                bits, offset = field("h", 72)[0], field("f", 108)[0]
            elif len(header) >= 540 and field("i", 0)[0] == 540:
                dim, pixdim = field("8q", 16), field("8d", 104)
                bits, offset = field("h", 14)[0], field("q", 168)[0]
            else:
                continue
            end = 1 + dim[0]
            return cls(dim[1:end], pixdim[1:end], bits, int(offset))
        return None

    @property
    def promised_bytes(self) -> int:
        """Returns the file size that the header implies: the end of the last voxel."""
        return self.offset + math.prod(self.shape) * self.bits // 8

    def check_spacing(self, path: pathlib.Path) -> None:
        """Raises UserError if an axis of several voxels has a spacing of 0, NaN or infinity."""
        axes = zip(self.shape[:3], self.spacing[:3], strict=True)
        if any(side > 1 and (value == 0 or not math.isfinite(value)) for side, value in axes):
            found = " x ".join(f"{value:g}" for value in self.spacing[:3])
            raise UserError(
                f"{path}: the header says {found} mm a voxel; write the scan's spacing (pixdim)"
            )


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
