"""Tells a file's format from its bytes; its name is only compared with them."""

import dataclasses
import pathlib
import re
import zlib

from medsam_jax.errors import UserError

# (offset, bytes, format); the first match counts. A DICOM preamble may look like a TIFF.
_MAGIC = (
    (128, b"DICM", "DICOM"),
    (344, b"n+1\0", "NIfTI"),
    (344, b"ni1\0", "NIfTI pair"),
    (0, b"\x5c\1\0\0", "ANALYZE"),  # 348, the size of its header and of NIfTI-1's
    (0, b"\0\0\1\x5c", "ANALYZE"),
    (4, b"n+2\0\r\n", "NIfTI-2 file"),
    (4, b"ni2\0\r\n", "NIfTI-2 file"),
    (0, b"NRRD0", "NRRD"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"BM", "BMP"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"PK\3\4", "zip"),
    (0, b"PK\5\6", "zip"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"version https://git-lfs", "Git LFS pointer"),
    (0, b"\x28\xb5\x2f\xfd", "zstd archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (0, b"BZh", "bzip2 archive"),
    (0, b"\xfd7zXZ\0", "xz archive"),
    (0, b"Rar!", "RAR archive"),
    (257, b"ustar", "tar archive"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"MATLAB 5.0 MAT-file", "MATLAB file"),
    (0, b"%PDF", "PDF"),
    (4, b"ftyp", "HEIF picture or video"),
    (0, b"\0\0\0\1\0\0", "FreeSurfer volume"),
)
PICTURES = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WebP", "JPEG 2000")
_SUFFIXES = {
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
    ".nrrd": "NRRD",
    ".nhdr": "NRRD",
    ".mha": "MetaImage",
    ".mhd": "MetaImage",
    ".dcm": "DICOM",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".webp": "WebP",
    ".npz": "zip",
}
_REMEDIES = {
    "NIfTI-2 file": "save it as NIfTI-1 (nibabel: nib.Nifti1Image.from_image(nib.load(FILE)))",
    "NumPy array": "save it as .npz with the array as imgs (a mask as gts)",
    "Git LFS pointer": "fetch the file itself: git lfs pull",
    "web page": "download the file again; the address asks for a login or is wrong",
    "JSON text": "give the image itself",
    "HDF5": "save its image as NIfTI, NRRD or .npz",
    "MATLAB file": "save its image as NIfTI, NRRD or .npz",
    "PDF": "save its pictures as PNG",
    "HEIF picture or video": "save it as PNG",
    "FreeSurfer volume": "convert it to NIfTI (mri_convert FILE OUT.nii.gz)",
}
_HEAD = 4096  # bytes that are looked at


@dataclasses.dataclass(frozen=True)
class Format:
    """Format of a file's bytes. `name` is a name in this module, or "" where it is not known."""

    name: str
    is_gzipped: bool = False

    def refuse_other(self, path: str) -> None:
        """Raises UserError for a format that is none of ours, or that stands in an archive."""
        packed = "gzip-compressed " if self.is_gzipped else ""
        if self.name in _REMEDIES and not path.lower().endswith((".mnc", ".h5", ".hdf5")):
            raise UserError(f"{path}: is a {packed}{self.name}; {_REMEDIES[self.name]}")
        if self.name.endswith("archive") or (self.is_gzipped and self.name != "NIfTI"):
            what = self.name or "file of an unknown format"
            raise UserError(f"{path}: is a {packed}{what}; unpack it and name the image inside")

    def remedy(self) -> str:
        """Returns the remedy for a format that could not be read, or ""."""
        return _REMEDIES.get(self.name, "")

    def notes(self, path: str) -> tuple[str, ...]:
        """Returns a note where the name belongs to another format."""
        stated = _stated(path)
        if not stated or not self.name or stated == self.name:
            return ()
        if self.name == "NIfTI pair" and stated == "NIfTI":
            return ()
        name = pathlib.Path(path).name
        return (f"The file is a {self.name}, although it is named {name}; read as {self.name}.",)


def identify(path: pathlib.Path) -> Format:
    """Returns the format of a file by its first bytes; gzip is looked into."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        if not head.startswith(b"\x1f\x8b"):
            return Format(_name(head))
        head += file.read(16 * _HEAD)
    try:
        inner = zlib.decompressobj(31).decompress(head, _HEAD)
    except zlib.error as error:
        raise UserError(f"{path}: damaged gzip ({error}); copy the file again") from None
    return Format(_name(inner), is_gzipped=True)


def _name(head: bytes) -> str:
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script", b"<!--")):
        return "web page"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    if re.search(rb"(?m)^\s*ndims\s*=", text):
        return "MetaImage"
    # DICOM without its preamble starts with an element of group 2 or 8.
    if head[:2] in (b"\2\0", b"\x08\0") and head[3:4] == b"\0" and len(head) > 8:
        return "DICOM"
    return ""


def _stated(path: str) -> str:
    """Returns the format that a file's name states, or ""."""
    name = pathlib.Path(path).name.lower()
    found = [suffix for suffix in _SUFFIXES if name.endswith(suffix)]
    return _SUFFIXES[max(found, key=len)] if found else ""
