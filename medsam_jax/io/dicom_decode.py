"""Decodes compressed and coloured DICOM pixels with GDCM, once their sizes are found credible.

GDCM is given a file that holds pixels alone, so that it rescales nothing.
"""

import io
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io import itk
from medsam_jax.io.dicom_headers import EXPORT, Header
from medsam_jax.io.quiet import quiet

RLE = "1.2.840.10008.1.2.5"
_COPIED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")
_COPIED += ("BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration", "NumberOfFrames")
_PALETTE = [
    f"{c}PaletteColorLookupTable{p}"
    for c in ("Red", "Green", "Blue")
    for p in ("Descriptor", "Data")
]
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_NEVER_DOUBTED = 16 << 20  # bytes of pixels: an empty picture takes a few hundred
_MOST_TIMES = 1000  # a picture's bytes, that its pixels may take
_MOST_TIMES_RLE = 64  # two bytes hold 128


def decode(header: Header) -> np.ndarray:
    """Returns the stored values of a file's frames, [frames, Y, X] or colours [frames, Y, X, 3].

    Raises:
      UserError: pixels that are cut, are a video, or that GDCM cannot decode.
    """
    import SimpleITK as sitk

    content = raw_content(header)
    if header.length < 0:
        content = _check_fragments(header, content)
    with tempfile.TemporaryDirectory(prefix="medsam_jax-") as folder:
        path = Path(folder) / "pixels.dcm"
        _save(header, content, path)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            with itk.no_warnings(), quiet():
                image = reader.Execute()
        except RuntimeError:
            if header.syntax == RLE:
                return _decode_rle(header, content)
            raise _undecodable(header) from None
    values = sitk.GetArrayFromImage(image)
    frames = values[None] if image.GetDimension() == 2 else values
    if frames.shape[:3] != (header.frame_count, *header.shape):
        raise _undecodable(header)
    return frames


def _undecodable(header: Header) -> UserError:
    from pydicom.uid import UID

    name = UID(header.syntax).name
    return UserError(
        f"{header.file}: its pixels ({name}) cannot be decoded; {EXPORT}, uncompressed"
    )


def raw_content(header: Header) -> bytes:
    """Returns the bytes of a file's pixels; those of encapsulated pixels with all that follows."""
    with (
        open(header.file, "rb") if header.inflated is None else io.BytesIO(header.inflated) as file
    ):
        file.seek(header.start)
        size = os.fstat(file.fileno()).st_size if header.inflated is None else len(header.inflated)
        return file.read(size if header.length < 0 else min(size, header.length))


def _save(header: Header, content: bytes, path: Path) -> None:
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    is_packed = header.length < 0
    dataset.file_meta.TransferSyntaxUID = header.syntax if is_packed else ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = _SECONDARY_CAPTURE
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    for keyword in (*_COPIED, *_PALETTE):
        if header.get(keyword) is not None:
            setattr(dataset, keyword, header.get(keyword))
    if header.get("PhotometricInterpretation") in ("MONOCHROME1", None):
        dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = content
    wide = header.integer("BitsAllocated") > 8 and not is_packed
    dataset["PixelData"].VR = "OW" if wide else "OB"
    dataset["PixelData"].is_undefined_length = is_packed
    dataset.save_as(path, enforce_file_format=True)


def _decode_rle(header: Header, content: bytes) -> np.ndarray:
    """Decodes with pydicom: GDCM refuses RLE of small pictures."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    options: dict[str, Any] = {
        "rows": header.shape[0],
        "columns": header.shape[1],
        "samples_per_pixel": header.integer("SamplesPerPixel", 1),
        "photometric_interpretation": str(header.get("PhotometricInterpretation", "MONOCHROME2")),
        "bits_allocated": header.integer("BitsAllocated"),
        "bits_stored": header.integer("BitsStored", header.integer("BitsAllocated")),
        "pixel_representation": header.integer("PixelRepresentation"),
        "planar_configuration": header.integer("PlanarConfiguration"),
        "number_of_frames": header.frame_count,
        "pixel_keyword": "PixelData",
        "transfer_syntax_uid": UID(header.syntax),
    }
    array, _ = get_decoder(UID(header.syntax)).as_array(
        content, decoding_plugin="pydicom", **options
    )
    return array if header.frame_count > 1 else array[None]


def _check_fragments(header: Header, content: bytes) -> bytes:
    """Returns encapsulated pixels without what follows them; checks fragments and sizes."""
    at, sizes = 0, []
    while at + 8 <= len(content):
        group, element, length = struct.unpack_from("<HHI", content, at)
        if (group, element) == (0xFFFE, 0xE0DD):
            break
        if (group, element) != (0xFFFE, 0xE000) or at + 8 + length > len(content):
            raise _cut(header)
        sizes.append((at + 8, length))
        at += 8 + length
    else:
        raise _cut(header)
    if len(sizes) - 1 < header.frame_count:  # the first item is a table of offsets
        raise UserError(
            f"{header.file}: holds {max(0, len(sizes) - 1)} of its {header.frame_count} compressed "
            f"frames; {EXPORT}"
        )
    _check_size(header, sum(length for _, length in sizes))
    start, length = sizes[1]
    found = _coded_size(content[start : start + min(length, 1 << 16)], header.syntax)
    if found and found != header.shape:
        raise UserError(
            f"{header.file}: its header says {header.shape[0]} x {header.shape[1]} pixels, its "
            f"compressed picture {found[0]} x {found[1]}; {EXPORT}"
        )
    return content[:at]


def _cut(header: Header) -> UserError:
    return UserError(f"{header.file}: the file is cut within its compressed pixels; {EXPORT}")


def _check_size(header: Header, packed: int) -> None:
    bits = header.integer("BitsAllocated") * header.integer("SamplesPerPixel", 1)
    promised = header.frame_count * header.shape[0] * header.shape[1] * bits // 8
    times = _MOST_TIMES_RLE if header.syntax == RLE else _MOST_TIMES
    if promised > times * packed and (promised > _NEVER_DOUBTED or header.syntax == RLE):
        raise UserError(
            f"{header.file}: its header promises {promised >> 10} KB of pixels, of which "
            f"{packed} bytes are there; {EXPORT}"
        )


def _coded_size(picture: bytes, syntax: str) -> tuple[int, int] | None:
    """Returns rows and columns that a JPEG, JPEG-LS or JPEG 2000 picture states itself."""
    if syntax == RLE:
        return None
    at = picture.find(b"\xff\x4f\xff\x51")
    if at >= 0 and at + 24 <= len(picture):
        width, height, left, top = struct.unpack_from(">IIII", picture, at + 8)
        return height - top, width - left
    # Segments are skipped by their lengths: a thumbnail within one has such a marker too.
    at = 2
    while picture.startswith(b"\xff\xd8") and at + 9 <= len(picture) and picture[at] == 0xFF:
        marker, length = picture[at + 1], struct.unpack_from(">H", picture, at + 2)[0]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", picture, at + 5)
        at += 2 + length
    return None
