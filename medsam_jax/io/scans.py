"""Reads scans and label maps of any common format into arrays with their geometry.

SimpleITK reads medical formats (NIfTI, NRRD, MetaImage, DICOM), Pillow reads pictures (PNG, JPEG,
TIFF), NumPy reads MedSAM's `.npz`. Arrays and spacings are both in (z, y, x) order; spacings in
another order would make surface metrics wrong.
"""

import dataclasses
import os
import pathlib

import numpy as np

from medsam_jax.errors import UserError, check_name
from medsam_jax.io import dicom, itk, nifti, npz, pictures
from medsam_jax.io.files import split_series
from medsam_jax.io.geometry import Scan, resample, same_grid


def read_scan(path: str | pathlib.Path) -> Scan:
    """Reads an image file or a DICOM series folder (`FOLDER#SERIES_UID` if it holds several).

    Returns:
      `Scan` in the file's own orientation and intensities.

    Raises:
      UserError: missing, empty, unreadable or truncated file, 4D, no or several series, NaN or
        infinite voxels. The message is one line with the file and the remedy.
    """
    scan = _read(str(path), as_labels=False)
    if not np.issubdtype(scan.array.dtype, np.floating):
        return scan
    bad = scan.array.size - int(np.count_nonzero(np.isfinite(scan.array)))
    if bad:
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; replace them (with 0, or air)")
    return scan


def read_mask(path: str | pathlib.Path, scan: Scan) -> np.ndarray:
    """Reads a label map onto the grid of `scan`.

    A mask on the same grid is not resampled. A mask on another grid (flipped, cropped, coarser) is
    resampled by nearest neighbour in physical space.

    Returns:
      int32 [Z, Y, X]; 0 is background.

    Raises:
      UserError: the errors of `read_scan`; negative or fractional labels; no labelled voxel; grids
        that do not overlap; different sizes if a file has no geometry.
    """
    mask = _read(str(path), as_labels=True)
    labels = _as_labels(mask.array, str(path))
    if mask.affine is None or scan.affine is None:
        if labels.shape != scan.array.shape[:3]:
            raise UserError(
                f"{path}: mask of {_size(labels)} for an image of {_size(scan.array)} without "
                "physical geometry to align them; save both at the same size"
            )
    elif not same_grid(mask, scan):
        labels = resample(dataclasses.replace(mask, array=labels), scan)
    if not labels.any():
        raise UserError(f"{path}: the mask is empty (no voxel above 0); leave this case out")
    return labels


def _size(array: np.ndarray) -> str:
    return " x ".join(str(side) for side in reversed(array.shape[:3]))


def _read(path: str, as_labels: bool) -> Scan:
    """Calls the reader for the type of the path; with `as_labels`, colours become labels."""
    check_name(path)
    file = pathlib.Path(split_series(path)[0])
    if not os.path.exists(file):
        raise UserError(f"{path}: does not exist; correct the path")
    if file.is_dir():
        return dicom.read_series(path)
    if file.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); copy the file again")
    suffix = file.suffix.lower()
    if suffix in pictures.SUFFIXES:
        array = pictures.read_labels(file) if as_labels else pictures.read_picture(file)
        return Scan(array, (float("nan"),) * 3, None, path)
    if suffix == ".npz":
        return npz.read_npz(path, "gts" if as_labels else "imgs")
    if file.name.lower().endswith((".nii", ".nii.gz")):
        nifti.check_nifti(file)
    return itk.read_sitk(path)


def _as_labels(array: np.ndarray, path: str) -> np.ndarray:
    """Returns a mask array as int32. Raises UserError for colours, negatives and fractions."""
    if array.ndim == 4:
        if not (array[..., :1] == array).all():
            raise UserError(f"{path}: the mask has colours; save a label map (one number a pixel)")
        array = array[..., 0]
    if np.issubdtype(array.dtype, np.floating):
        bad = int(np.count_nonzero(~np.isfinite(array) | (array != np.round(array))))
        if bad:
            raise UserError(
                f"{path}: {bad} voxels are no whole labels (e.g. "
                f"{array[~np.isfinite(array) | (array != np.round(array))][0]:g}); "
                "threshold a probability map, or resample with nearest neighbour"
            )
    if array.size and array.min() < 0:
        raise UserError(f"{path}: has a negative label ({array.min():g}); renumber the labels")
    if array.size and array.max() > np.iinfo(np.int32).max:
        raise UserError(f"{path}: label {array.max():g} is too large; renumber the labels")
    return array.astype(np.int32)
