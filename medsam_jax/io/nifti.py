"""Reads NIfTI with ITK, after checks for defects that ITK accepts silently."""

import dataclasses
import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io import itk
from medsam_jax.io.geometry import Scan, shear_degrees

_TO_MM = {1: 1000.0, 3: 0.001}  # of xyzt_units: metres and micrometres; any other value is mm
# By datatype.
_BITS = {2: 8, 4: 16, 8: 32, 16: 32, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32, 1024: 64}
_BITS |= {1280: 64, 2304: 32}
_RGB = {128: "RGB", 2304: "RGBA"}
_OTHER = {1: "single bits", 32: "complex64", 1536: "float128", 1792: "complex128"}
_OTHER |= {2048: "complex256"}


def read_nifti(path: str, is_gzipped: bool) -> Scan:
    """Reads `.nii`, `.nii.gz` or a `.hdr`/`.img` pair; notes tell where other readers differ.

    Raises:
      UserError: truncated, no spacing, sheared axes, forms that contradict `pixdim`, vectors. The
        message has the file, the header's values and the remedy.
    """
    file = pathlib.Path(path)
    name = file.name.lower()
    if is_gzipped and not name.endswith(".gz"):
        raise UserError(
            f"{path}: is gzip-compressed, its name does not say so; rename it to "
            f"{name.removesuffix('.nii')}.nii.gz"
        )
    if not name.endswith((".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")):
        raise UserError(f"{path}: is a NIfTI file; rename it to {file.name}.nii")
    header_file, data = file, file
    if name.endswith((".hdr", ".hdr.gz")):
        data = _partner(file, ".img")
    elif name.endswith((".img", ".img.gz")):
        header_file = _partner(file, ".hdr")
    header = _checked_header(header_file, data)
    try:
        scan = itk.read_sitk(path, "NiftiImageIO", header.colours)
    except UserError as error:
        if "orthonormal" in str(error):
            _refuse_shear(header, path)
        raise
    if header.slope == 0 and header.intercept:  # ITK adds the intercept all the same
        scan = dataclasses.replace(scan, array=scan.array - scan.array.dtype.type(header.intercept))
    notes = _notes(header, path, scan)
    if name.endswith(".gz") and not is_gzipped:
        notes.append("The file is not compressed, although its name ends in .gz; read as it is.")
    return dataclasses.replace(scan, notes=tuple(notes))


def _partner(file: pathlib.Path, suffix: str) -> pathlib.Path:
    """Returns the other file of a `.hdr`/`.img` pair. Raises UserError if it is missing."""
    name = file.name.removesuffix(".gz")
    for ending in (suffix, suffix.upper(), f"{suffix}.gz"):
        partner = file.with_name(name[:-4] + ending)
        if partner.exists():
            return partner
    raise UserError(f"{file}: its other half {name[:-4]}{suffix} is missing; copy it beside it")


def _checked_header(path: pathlib.Path, data: pathlib.Path) -> "_Header":
    """Returns a file's header after all checks that need no voxel.

    A compressed file states its size in the last four bytes. The whole file is decompressed only
    if that size disagrees (truncated file, or several gzip members).
    """
    try:
        with gzip.open(path) if _is_gzipped(path) else open(path, "rb") as file:
            header = _Header.parse(file.read(352))
        if header is None:
            raise UserError(f"{path}: the NIfTI header is damaged; copy the file again")
        header.check(path)
        _check_forms(header, str(path))
        needed = header.promised_bytes
        if not _is_gzipped(data):
            found = data.stat().st_size
        else:
            found = _recorded_size(data)
            if found != needed % 2**32 or needed > 1100 * data.stat().st_size + 4096:
                found = _decompressed_size(data)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file again") from None
    if found < needed:
        raise UserError(
            f"{data}: cannot be read (truncated: {found} bytes of {needed}); copy the file again"
        )
    return header


@dataclasses.dataclass(frozen=True)
class _Header:
    """Fields of a NIfTI-1 or ANALYZE header that the checks use; lengths in mm."""

    magic: bytes
    shape: tuple[int, ...]
    spacing: tuple[float, ...]  # in the order of `shape`
    datatype: int
    offset: float  # of the first voxel, in bytes
    slope: float
    intercept: float
    intent: int
    qform: np.ndarray | None  # [3, 4], voxel index to mm, x to the right; None for code 0
    sform: np.ndarray | None

    @classmethod
    def parse(cls, header: bytes) -> "_Header | None":
        """Parses a NIfTI-1 header; returns None for other bytes."""
        for order in "<>":

            def field(kind: str, start: int, order: str = order) -> tuple:
                return struct.unpack_from(order + kind, header, start)

            if len(header) < 348 or field("i", 0)[0] != 348:
                continue
            dim, pixdim = field("8h", 40), field("8f", 76)
            if not 1 <= dim[0] <= 7:
                return None
            magic = header[344:348]
            is_nifti = magic in (b"n+1\0", b"ni1\0")
            offset = field("f", 108)[0]
            scale = _TO_MM.get(header[123] & 7, 1.0) if is_nifti else 1.0
            spacing = tuple(value * scale for value in pixdim[1:4]) + pixdim[4:8]
            qcode, scode = field("2h", 252) if is_nifti else (0, 0)
            with np.errstate(all="ignore"):  # of NaN and infinity, which are refused later
                qform = _from_quaternion(field("6f", 256), pixdim) * scale if qcode > 0 else None
                sform = np.reshape(field("12f", 280), (3, 4)) * scale if scode > 0 else None
            end = 1 + dim[0]
            return cls(
                magic=magic,
                shape=dim[1:end],
                spacing=spacing[: dim[0]],
                datatype=field("h", 70)[0],
                offset=offset,
                slope=field("f", 112)[0] if is_nifti else 1.0,
                intercept=field("f", 116)[0] if is_nifti else 0.0,
                intent=field("h", 68)[0] if is_nifti else 0,
                qform=qform,
                sform=sform,
            )
        return None

    @property
    def colours(self) -> str:
        """Returns "RGB", "RGBA", or "" where a voxel has one value."""
        return _RGB.get(self.datatype, "")

    @property
    def promised_bytes(self) -> int:
        """Returns the file size that the header implies: the end of the last voxel."""
        return int(self.offset) + math.prod(self.shape) * _BITS[self.datatype] // 8

    def check(self, path: pathlib.Path) -> None:
        """Raises UserError for values in the header that cannot be right."""
        if min(self.shape) < 1 or not 0 <= self.offset < 2**40:
            raise UserError(
                f"{path}: the header says {_times(self.shape)} voxels from byte {self.offset:g}; "
                "copy the file again"
            )
        self._check_spacing(path)
        if np.isfinite(self.slope) and self.slope != 0 and not np.isfinite(self.intercept):
            raise UserError(
                f"{path}: scl_slope is {self.slope:g} and scl_inter {self.intercept:g}; write the "
                "intercept"
            )
        if self.datatype not in _BITS:
            found = _OTHER.get(self.datatype, f"of the unknown datatype {self.datatype}")
            raise UserError(f"{path}: voxels are {found}; save integers or float32")
        if math.prod(self.shape[4:]) > 1:
            raise UserError(
                f"{path}: has {len(self.shape)} dimensions ({_times(self.shape)}, intent "
                f"{self.intent}: several values a voxel); save each as a 3D file of its own"
            )

    def _check_spacing(self, path: pathlib.Path) -> None:
        """Raises UserError if an axis of several voxels has no spacing above 0."""
        axes = zip(self.shape[:3], self.spacing[:3], strict=True)
        if any(side > 1 and not 0 < value < math.inf for side, value in axes):
            found = _times(self.spacing[:3])
            raise UserError(
                f"{path}: the header says {found} mm a voxel; write the scan's spacing (pixdim)"
            )


def _check_forms(header: _Header, path: str) -> None:
    """Raises UserError for a qform or sform that is no affine, or that contradicts `pixdim`."""
    for name, form in (("sform", header.sform), ("qform", header.qform)):
        if form is not None and not np.isfinite(form).all():
            raise UserError(f"{path}: the {name} has NaN or infinity; write the scan's affine")
    if header.sform is None or not header.sform[:, :3].any():
        _check_quaternion(header, path)
        return
    if header.qform is None and shear_degrees(header.sform) > 0.01:
        _refuse_shear(header, path)
    steps = np.linalg.norm(header.sform[:, :3], axis=0)[: len(header.spacing)]
    stated = np.array(header.spacing[:3])
    apart = np.abs(steps - stated) > 0.01 * np.maximum(steps, stated)
    if (apart & (np.array(header.shape[:3]) > 1)).any():
        raise UserError(
            f"{path}: pixdim says {_times(stated)} mm a voxel, the sform {_times(steps)}; "
            "write the scan's spacing into both"
        )


def _check_quaternion(header: _Header, path: str) -> None:
    """Raises UserError if the qform is needed and is no rotation."""
    if header.qform is None:
        return
    steps = np.linalg.norm(header.qform[:, :3], axis=0)[: len(header.spacing)]
    if np.abs(steps - header.spacing[:3]).max() > 0.01 * max(header.spacing[:3]):
        raise UserError(f"{path}: the quaternion of the qform is no rotation; write the affine")


def _refuse_shear(header: _Header, path: str) -> None:
    """Raises UserError with the angle by which the axes of the sform are not orthogonal."""
    if header.sform is None:
        return
    if not np.linalg.det(header.sform[:, :3]):
        raise UserError(f"{path}: the sform has an axis of length 0; write the scan's affine")
    raise UserError(
        f"{path}: the axes of the sform are sheared by {shear_degrees(header.sform):.2g} "
        "degrees; resample the scan to orthogonal axes (nibabel.processing.resample_to_output), "
        "or write an orthogonal affine if this is rounding"
    )


def _notes(header: _Header, path: str, scan: Scan) -> list[str]:
    """Returns notes on what other readers take otherwise. Raises UserError for a sheared sform.

    ITK takes the qform where the sform's axes are not orthogonal, or by its code.
    """
    notes = []
    scaling = header.slope, header.intercept
    if not np.isfinite(scaling).all() or (header.slope == 0 and header.intercept):
        notes.append(
            f"The header's scaling (slope {header.slope:g}, intercept {header.intercept:g}) is no "
            "scaling; stored values are taken."
        )
    if header.magic not in (b"n+1\0", b"ni1\0"):
        notes.append("The file is ANALYZE, which states no position; orientation is assumed.")
    elif header.qform is None and header.sform is None:
        notes.append(
            "The header states no position (sform and qform codes are 0); the axes are taken "
            "as left, posterior, superior from 0."
        )
    if header.qform is None or header.sform is None or len(header.shape) < 3:
        return notes
    apart = _apart(header.qform, header.sform, header.shape)
    if apart > 0.1 * min(header.spacing[:3]):
        if shear_degrees(header.sform) > 0.01:
            _refuse_shear(header, path)
        used = scan.to_ras()
        forms = {"sform": header.sform, "qform": header.qform}
        name = min(forms, key=lambda name: _apart(forms[name], used, header.shape))
        notes.append(f"The sform and the qform are up to {apart:.3g} mm apart; the {name} is used.")
    return notes


def _times(values: tuple[float, ...] | np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _from_quaternion(fields: tuple[float, ...], pixdim: tuple[float, ...]) -> np.ndarray:
    """Returns the affine [3, 4] of a qform, as the NIfTI-1 standard defines it."""
    b, c, d, *origin = fields
    a = math.sqrt(max(0.0, 1 - (b * b + c * c + d * d)))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    steps = np.array(pixdim[1:4]) * (1, 1, -1 if pixdim[0] < 0 else 1)
    return np.hstack([turn * steps, np.reshape(origin, (3, 1))])


def _apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Returns the largest distance, in mm, between the places of one corner of a volume."""
    last = np.array(shape[:3]) - 1
    corners = np.array([(*(last * [i & 1, i >> 1 & 1, i >> 2 & 1]), 1) for i in range(8)])
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def _is_gzipped(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


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
