"""Reads PNG, JPEG, TIFF, BMP, GIF, WebP and JPEG 2000 files as images or label maps.

Pillow reads all but TIFF (`tiff.py`) and PNG with 16-bit colours, which OpenCV reads whole.
"""

import io
import pathlib
import re
import warnings
import zlib
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io import pages, tiff
from medsam_jax.io.geometry import Scan
from medsam_jax.io.quiet import quiet

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_NAN3 = (float("nan"),) * 3
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP")
_PNG_SAMPLES = {2: 3, 4: 2, 6: 4}  # by colour type: RGB, grey and alpha, RGBA
_MOST_BYTES = 1 << 26  # of pixels that are never doubted
_MOST_RATIO = 2000  # pixel bytes for each byte of a file; deflate and JPEG stay below


def read_picture(path: pathlib.Path, format_name: str) -> Scan:
    """Reads a picture [1, H, W] or [1, H, W, 3], a multi-page TIFF as [Z, H, W].

    The orientation tag is applied. Alpha is dropped, palettes become colours, and 16-bit grey stays
    16-bit. Grey stored as equal colours becomes one channel. Resolution tags are never mm.

    Raises:
      UserError: an unreadable or animated file, or one whose values have no sure meaning.
    """
    array, notes = _read(path, format_name, as_labels=False)
    if array.ndim == 4 and (array[..., :1] == array).all():
        array = array[..., 0]
    return Scan(array, _NAN3, None, str(path), notes)


def read_labels(path: pathlib.Path, format_name: str) -> Scan:
    """Reads a label map [Z, H, W], or [Z, H, W, 3] if it has colours; palette indices are labels.

    Raises UserError for lossy compression with more than two values: it smears labels.
    """
    array, notes = _read(path, format_name, as_labels=True)
    return Scan(array, _NAN3, None, str(path), notes)


def _read(
    path: pathlib.Path, format_name: str, as_labels: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")  # of Pillow and tifffile, on tags that are not used
            if format_name == "TIFF":
                array, notes, is_lossy = tiff.read_tiff(path, as_labels)
            else:
                page, notes, is_lossy = _single(path, as_labels)
                array = page[None]
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds in Pillow and tifffile
        reason = re.sub(r" ?<_io\.BytesIO object.*?>", "", " ".join(str(error).split()))[:160]
        reason = reason or type(error).__name__
        raise UserError(
            f"{path}: cannot be read ({reason}); the picture is damaged: copy or export it again"
        ) from None
    if as_labels and is_lossy and len(found := np.unique(array)) > 2:
        lossy = "JPEG" if format_name == "TIFF" else format_name
        raise UserError(
            f"{path}: {lossy} has smeared the labels (values {found[:4].tolist()}...); "
            "save masks as PNG"
        )
    return array, notes


def _single(path: pathlib.Path, as_labels: bool) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Returns the only picture of a file, notes, and whether its compression is lossy."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # slides and dermoscopy are large; `_check_size` judges instead
    # From memory: a damaged length then is no reason to allocate so much.
    content = path.read_bytes()
    if content[8:12] == b"WEBP":  # Pillow allocates the pixels when it opens the file
        _check_size(path, *_webp_size(content), 4)
    with Image.open(io.BytesIO(content)) as image:
        _check_size(path, *image.size, len(image.getbands()))
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise UserError(
                f"{path}: is an animation of {image.n_frames} frames; save them as pages of a TIFF"
            )
        image.load()
        deep = _deep_png(path) if image.format == "PNG" else None
        orientation = image.getexif().get(0x0112, 1)
        is_lossy = image.format in _LOSSY
        if deep is not None:
            page, alpha = deep
        else:
            alpha = _alpha(image)
            page = pages.label_page(image) if as_labels else pages.colour_page(image)
            if as_labels and image.format == "PNG":
                page = page // _stretch(path)
    notes = pages.alpha_notes(alpha)
    return pages.oriented(page, orientation), notes, is_lossy


def _webp_size(content: bytes) -> tuple[int, int]:
    """Returns width and height of a WebP file: lossy, lossless or extended."""
    kind, head = content[12:16], content[20:30].ljust(10, b"\0")
    if kind == b"VP8 ":
        return tuple(int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return tuple(int.from_bytes(head[at : at + 3], "little") + 1 for at in (4, 7))


def _check_size(path: pathlib.Path, width: int, height: int, samples: int) -> None:
    """Raises UserError if a file is too small for the pixels that it promises."""
    promised = width * height * samples
    size = path.stat().st_size
    if promised > max(_MOST_BYTES, _MOST_RATIO * size):
        raise UserError(
            f"{path}: says {width} x {height} pixels in {size} bytes; copy or export it again"
        )


def _stretch(path: pathlib.Path) -> int:
    """Returns the factor by which Pillow multiplies a PNG's grey values of 2 or 4 bits."""
    depth, colour_type = _png_header(path)
    return {2: 85, 4: 17}.get(depth, 1) if colour_type == 0 else 1


def _png_header(path: pathlib.Path) -> tuple[int, int]:
    """Returns a PNG's bits per sample and colour type."""
    with open(path, "rb") as file:
        header = file.read(26)
    return header[24], header[25]


def _deep_png(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Returns 16-bit colours (or grey) and alpha, of which Pillow keeps 8 bits; None for others."""
    depth, colour_type = _png_header(path)
    if depth != 16 or colour_type not in _PNG_SAMPLES:
        return None
    import cv2

    content = path.read_bytes()
    _check_chunks(content)
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16:
        raise ValueError("damaged 16-bit PNG")
    alpha = found[..., 3] if found.shape[2] == 4 and colour_type != 2 else None
    colours = np.ascontiguousarray(found[..., 2::-1])  # OpenCV has blue first
    return (colours[..., 0] if colour_type == 4 else colours), alpha


def _alpha(image: Any) -> np.ndarray | None:
    if image.mode not in ("LA", "PA", "RGBA", "La", "RGBa"):
        return None
    return np.asarray(image.getchannel(image.getbands()[-1]))


def _check_chunks(content: bytes) -> None:
    """Raises ValueError for a PNG whose chunks are damaged: OpenCV allocates what they promise."""
    at = 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        end = at + 8 + length
        name, stored = content[at + 4 : at + 8], content[end : end + 4]
        if zlib.crc32(content[at + 4 : end]).to_bytes(4, "big") != stored:
            raise ValueError(f"chunk {name!r} is damaged")
        if name == b"IEND":
            return
        at = end + 4
    raise ValueError("its end is missing")
