"""Reads PNG, JPEG and TIFF files as images or label maps with Pillow."""

import pathlib
from typing import Any

import numpy as np

from medsam_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I", "F")


def read_picture(path: pathlib.Path) -> np.ndarray:
    """Reads a picture [1, H, W] or [1, H, W, 3], a multi-page TIFF as [Z, H, W].

    EXIF rotation is applied. Alpha is dropped, palettes become colours, and 16-bit grey stays
    16-bit. Grey stored as equal colours becomes one channel. Raises UserError for an unreadable
    file.
    """
    pages = _pages(path, _colour_page)
    if pages.ndim == 4 and (pages[..., :1] == pages).all():
        pages = pages[..., 0]
    return pages


def read_labels(path: pathlib.Path) -> np.ndarray:
    """Reads a label map [Z, H, W], or [Z, H, W, 3] if it has colours; palette indices are labels.

    Raises UserError for a JPEG with more than two values: compression smears labels.
    """
    labels = _pages(path, _label_page)
    if path.suffix.lower() in (".jpg", ".jpeg") and len(np.unique(labels)) > 2:
        raise UserError(
            f"{path}: JPEG has smeared the labels (values {np.unique(labels)[:4].tolist()}...); "
            "save masks as PNG"
        )
    return labels


def _pages(path: pathlib.Path, convert: Any) -> np.ndarray:
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # slides and dermoscopy are large; the file is the user's own
    try:
        with Image.open(path) as image:
            if image.mode in ("RGB", "RGBA") and "16" in str(image.tile):
                return _read_deep(path)[None]  # Pillow would keep only the upper 8 bits
            multi_page = image.format == "TIFF"
            frames = ImageSequence.Iterator(image) if multi_page else [image]
            pages = [convert(ImageOps.exif_transpose(frame)) for frame in frames]
    except UnidentifiedImageError:
        pages = [_read_deep(path)]
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or export it again") from None
    if any(page.shape != pages[0].shape for page in pages):
        raise UserError(f"{path}: pages of different sizes; save one picture a file")
    return np.stack(pages)


def _colour_page(image: Any) -> np.ndarray:
    if image.mode in _GREY_MODES:
        return np.asarray(image)
    if image.mode in ("1", "LA"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))  # P, PA, RGBA, CMYK, YCbCr


def _label_page(image: Any) -> np.ndarray:
    if image.mode in (*_GREY_MODES, "P"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode in ("LA", "PA"):
        return np.asarray(image.getchannel(0))
    return np.asarray(image.convert("RGB"))


def _read_deep(path: pathlib.Path) -> np.ndarray:
    """Reads [H, W] or [H, W, 3] with SimpleITK, for types that Pillow lacks (16-bit colours)."""
    import SimpleITK as sitk

    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError:
        raise UserError(
            f"{path}: is not a picture that can be read (wrong format or damaged); export it again"
        ) from None
    return array[..., :3] if array.ndim == 3 and array.shape[-1] in (3, 4) else array
