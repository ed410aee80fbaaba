"""Names and formats of what the predict command writes, each file whole or not at all."""

import os
from pathlib import Path

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.dicom import is_dicom
from medsam_jax.io.files import split_series
from medsam_jax.io.folders import SCAN_SUFFIXES
from medsam_jax.io.geometry import Scan
from medsam_jax.io.pictures import SUFFIXES as PICTURE_SUFFIXES

MASK_FORMATS = ("nii.gz", "nii", "nrrd", "mha", "png", "tif", "dcm")


def stem(image: str) -> str:
    """The name that an image's outputs start with: its file without suffix, or its folder."""
    name = os.path.basename(os.path.abspath(split_series(image)[0]))
    for suffix in (*SCAN_SUFFIXES, *PICTURE_SUFFIXES, ".dcm"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def mask_suffix(image: str, slices: int, wanted: str | None = None) -> str:
    """Suffix of the mask's file: the input's own; PNG for pictures, a DICOM SEG for DICOM.

    `.mhd` becomes `.mha`, one file instead of two; MedSAM's `.npz` becomes NIfTI. `wanted` is one
    of `MASK_FORMATS` instead. Raises UserError where it cannot hold a mask of so many slices.
    """
    lower = image.lower()
    if wanted == "png" and slices > 1:
        raise UserError(f"--mask_format png: {image} has {slices} slices; use tif, nii.gz or nrrd")
    if wanted == "dcm" and not is_dicom(image):
        raise UserError(f"--mask_format dcm: {image} is no DICOM series that a SEG could refer to")
    if wanted:
        return f".{wanted}"
    if is_dicom(image):
        return ".dcm"
    if lower.endswith(PICTURE_SUFFIXES):
        return ".png" if slices == 1 else ".tif"
    suffix = next((suffix for suffix in SCAN_SUFFIXES if lower.endswith(suffix)), ".nii.gz")
    return {".mhd": ".mha", ".npz": ".nii.gz"}.get(suffix, suffix)


def write_mask(path: Path, scan: Scan, labels: np.ndarray) -> None:
    """Writes a label map [Z, Y, X] on the scan's grid as a picture or through SimpleITK."""
    largest = int(labels.max(initial=0))
    labels = labels.astype(np.uint8 if largest < 256 else np.uint16)
    if path.suffix in (".png", ".tif"):
        write_picture(path, *labels)
        return
    import SimpleITK as sitk

    try:
        sitk.WriteImage(scan.to_image(labels), str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[-1]) from None


def write_picture(path: Path, *pages: np.ndarray) -> None:
    """Writes one picture [Y, X] or [Y, X, 3], or the pages of a TIFF."""
    from PIL import Image

    images = [Image.fromarray(page) for page in pages]
    more = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(path, **more)
