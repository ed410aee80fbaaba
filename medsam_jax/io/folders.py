"""Finds the images of a folder, and names the files that could be images and cannot be read.

Hidden files, files of the desktop (`Thumbs.db`, `._scan.nii.gz`) and texts are left out silently.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from medsam_jax.errors import UserError
from medsam_jax.io.formats import PICTURES, identify
from medsam_jax.io.pictures import SUFFIXES as PICTURE_SUFFIXES

SCAN_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".npz")
IMAGE_SUFFIXES = (*SCAN_SUFFIXES, *PICTURE_SUFFIXES)
_SCAN_FORMATS = ("NIfTI", "NIfTI pair", "ANALYZE", "NRRD", "MetaImage")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")
_DOCUMENTS = (".pdf", ".docx", ".xlsx", ".pptx", ".doc", ".xls", ".ppt", ".pyc", ".db", ".sqlite")
_DOCUMENTS += (".pth", ".pt", ".ckpt", ".safetensors", ".array_record")
_DATA_OF = {".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",), ".img": (".hdr",)}


@dataclasses.dataclass(frozen=True)
class Contents:
    """Images under a folder, sorted, and one line for each file left out that could be one."""

    files: list[Path]  # of formats that are not DICOM
    dicom: dict[Path, list[Path]]  # folder -> its DICOM files
    left_out: list[str]


def search(folder: Path, deep: bool = True) -> Contents:
    """Sorts the files in a folder, and with `deep` in all folders below it, linked ones too."""
    contents = Contents([], {}, [])
    for file in sorted(_walk(folder, deep)):
        name = file.name.lower()
        if name.endswith(IMAGE_SUFFIXES):
            contents.files.append(file)
        elif name == "dicomdir":
            contents.left_out.append(f"{file}: an index of DICOM files; the files are looked at")
        elif name.endswith(_DICOM_SUFFIXES):
            contents.dicom.setdefault(file.parent, []).append(file)
        elif not name.endswith(_DOCUMENTS):
            _sort_unknown(file, contents)
    return contents


def visible_folders(folder: Path) -> list[Path]:
    """Returns the folders in a folder, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _is_junk(p.name))


def _walk(folder: Path, deep: bool) -> Iterator[Path]:
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        kept = [] if real in seen or not deep else [n for n in folders if not _is_junk(n)]
        folders[:] = kept
        if real not in seen:
            yield from (Path(root, name) for name in names if not _is_junk(name))
        seen.add(real)


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _sort_unknown(file: Path, contents: Contents) -> None:
    """Takes an image under any name; names what is neither that nor a text."""
    suffix = file.suffix.lower()
    headers = _DATA_OF.get(suffix, ())
    if any(file.with_suffix(header).exists() for header in headers):
        return  # the header names it
    try:
        with open(file, "rb") as opened:
            is_text = b"\0" not in opened.read(1024)
        found = identify(file).name
    except OSError as error:
        contents.left_out.append(f"{file}: cannot be read ({error.strerror})")
        return
    except UserError as error:
        contents.left_out.append(str(error))
        return
    if found == "DICOM":
        contents.dicom.setdefault(file.parent, []).append(file)
    elif found in _SCAN_FORMATS or found in PICTURES:
        contents.files.append(file)
    elif headers:
        contents.left_out.append(f"{file}: has no {' or '.join(headers)} file beside it")
    elif not is_text:
        kind = suffix or "a file without suffix"
        contents.left_out.append(
            f"{file}: {kind} is no format that is taken from folders; save it as .nii.gz or .png, "
            "unpack it, or name the file itself"
        )
