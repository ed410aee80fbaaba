"""Turns Pillow images and stored pixels into pages: colours or labels, upright, without alpha."""

from typing import Any

import numpy as np

_GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I", "F")


def colour_page(image: Any) -> np.ndarray:
    """Returns a Pillow image as grey [H, W] or colours [H, W, 3]."""
    if image.mode in _GREY_MODES:
        return np.asarray(image)
    if image.mode in ("1", "LA"):
        return np.asarray(image.convert("L"))
    return _rgb(image)


def label_page(image: Any) -> np.ndarray:
    """Returns a Pillow image as labels [H, W], or as colours [H, W, 3]."""
    if image.mode in (*_GREY_MODES, "P"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode in ("LA", "PA"):
        return np.asarray(image.getchannel(0))
    return _rgb(image)


def _rgb(image: Any) -> np.ndarray:
    """Returns P, PA, RGBA, CMYK or YCbCr as RGB [H, W, 3]; RGB without Pillow's copy."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def alpha_notes(alpha: np.ndarray | None) -> tuple[str, ...]:
    """Returns a note if a picture's alpha, which is dropped, is not the same everywhere."""
    if alpha is None or alpha.min() == alpha.max():
        return ()
    return (f"Transparency ({alpha.min()} to {alpha.max()}) is dropped; colours are kept.",)


def oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a picture [H, W, ...] as it is to be shown, by its EXIF or TIFF orientation, 1-8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def unoriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a shown picture as it is stored: the inverse of `oriented`."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    return oriented(array, inverse)
