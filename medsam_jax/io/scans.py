"""Reads scans and label maps of any common format into arrays with their geometry.

SimpleITK reads medical formats (NIfTI, NRRD, MetaImage, DICOM), Pillow and tifffile read pictures
(PNG, JPEG, TIFF), NumPy reads MedSAM's `.npz`. The format is found by the file's bytes, not by its
name. Arrays and spacings are both in (z, y, x) order; spacings in another order would make surface
metrics wrong.
"""

import dataclasses
import os
import pathlib

import numpy as np

from medsam_jax.errors import UserError, check_name
from medsam_jax.io import dicom, formats, itk, nifti, npz, pictures, text_headers
from medsam_jax.io.files import split_series
from medsam_jax.io.geometry import Scan
from medsam_jax.io.masks import as_labels, check_sharp, on_grid


def read_scan(path: str | pathlib.Path) -> Scan:
    """Reads an image file or a DICOM series folder (`FOLDER#SERIES_UID` if it holds several).

    Returns:
      `Scan` in the file's own orientation and intensities.

    Raises:
      UserError: missing, empty, unreadable or truncated file, 4D, no or several series, NaN or
        infinite voxels. The message is one line with the file and the remedy.
    """
    scan = _read(str(path))
    if not np.issubdtype(scan.array.dtype, np.floating):
        return scan
    bad = scan.array.size - int(np.count_nonzero(np.isfinite(scan.array)))
    if bad:
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; replace them (with 0, or air)")
    return scan


def read_mask(path: str | pathlib.Path, scan: Scan) -> np.ndarray:
    """Reads a label map onto the grid of `scan`; returns the array of `read_mask_scan`."""
    return read_mask_scan(path, scan).array


def read_mask_scan(path: str | pathlib.Path, scan: Scan) -> Scan:
    """Reads a label map onto the grid of `scan`, with notes on how.

    A mask on the same grid is not resampled. A mask on another grid (flipped, cropped, coarser) is
    resampled by nearest neighbour in physical space.

    Returns:
      `Scan` of int32 [Z, Y, X]; 0 is background.

    Raises:
      UserError: the errors of `read_scan`; negative, fractional or smeared labels; no labelled
        voxel; grids that do not overlap; a mask that lost its geometry; different sizes if a file
        has no geometry.
    """
    mask = _read(str(path), scan)
    mask = dataclasses.replace(mask, array=as_labels(mask.array, str(path)))
    placed = on_grid(mask, scan)
    check_sharp(mask.array, str(path))
    if not placed.array.any():
        raise UserError(f"{path}: the mask is empty (no voxel above 0); leave this case out")
    return placed


def _read(path: str, image: Scan | None = None) -> Scan:
    """Calls the reader of the format that the bytes have.

    A mask is read with the image that it belongs to: its palette indices are labels.
    """
    check_name(path)
    file = pathlib.Path(split_series(path)[0])
    if not os.path.exists(file):
        raise UserError(f"{path}: does not exist; correct the path")
    if file.is_dir():
        return dicom.read_series(path, image)
    if file.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); copy the file again")
    found = formats.identify(file)
    found.refuse_other(path)
    scan = _by_format(path, file, found, image)
    return dataclasses.replace(scan, notes=found.notes(path) + scan.notes)


def _by_format(path: str, file: pathlib.Path, found: formats.Format, image: Scan | None) -> Scan:
    is_mask = image is not None
    if found.name in formats.PICTURES:
        read = pictures.read_labels if is_mask else pictures.read_picture
        return read(file, found.name)
    suffix = file.suffix.lower()
    if not found.name and suffix in pictures.SUFFIXES:
        raise UserError(f"{path}: is not a picture, or its beginning is damaged; export it again")
    if found.name == "zip" or (not found.name and suffix == ".npz"):
        return npz.read_npz(path, "gts" if is_mask else "imgs")
    if found.name in ("NIfTI", "NIfTI pair", "ANALYZE"):
        return nifti.read_nifti(path, found.is_gzipped)
    if found.name == "NRRD":
        return text_headers.read_nrrd(path)
    if found.name == "MetaImage":
        return text_headers.read_metaimage(path)
    if found.name == "DICOM" or suffix == ".dcm":
        return dicom.read_file(path, image)
    if not found.name and suffix == ".img":
        return nifti.read_nifti(path, found.is_gzipped)
    try:
        return itk.read_sitk(path)  # MINC, GIPL, VTK and others that ITK knows
    except UserError:
        if found.remedy():
            raise UserError(f"{path}: is a {found.name}; {found.remedy()}") from None
        raise
