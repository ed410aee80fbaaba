"""Reads DICOM series."""

import pathlib

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io import itk
from medsam_jax.io.files import split_series
from medsam_jax.io.geometry import Scan


def is_dicom(path: str) -> bool:
    """Returns whether a path is read as DICOM: a folder, or a file with suffix .dcm."""
    file = pathlib.Path(split_series(path)[0])
    return file.is_dir() or file.suffix.lower() == ".dcm"


def list_series(folder: str | pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Maps the UID of each DICOM series directly in a folder to its files in slice order."""
    import SimpleITK as sitk

    with itk.no_warnings():
        uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        return {
            uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in uids
        }


def dicom_files(path: str) -> tuple[str, ...]:
    """Returns the files of a DICOM path (`is_dicom`), one per slice, in the array's slice order.

    Raises:
      UserError: no series, or several and none chosen.
    """
    folder, wanted = split_series(path)
    if not pathlib.Path(folder).is_dir():
        return (path,)
    found = list_series(folder)
    return found[_choose_series(path, wanted, found)]


def read_series(path: str) -> Scan:
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.SetFileNames(dicom_files(path))
    with itk.no_warnings():
        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise UserError(
                f"{path}: the series cannot be read ({itk.reason(error)}); export it again"
            ) from None
    # ITK marks a series whose slices are not evenly spaced, but its number cannot be read here
    if image.HasMetaDataKey("ITK_non_uniform_sampling_deviation"):
        places = [reader.GetMetaData(index, "0020|0032") for index in range(image.GetDepth())]
        points = np.array([[float(value) for value in place.split("\\")] for place in places])
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
        if np.ptp(steps) > max(0.01, 0.01 * np.median(steps)):
            raise UserError(
                f"{path}: slices are not evenly spaced ({steps.min():.2f} to {steps.max():.2f} mm "
                "apart); files are missing or belong to another series"
            )
    return itk.from_sitk(image, path)


def _choose_series(path: str, wanted: str, found: dict[str, tuple[str, ...]]) -> str:
    """Returns the series to read; raises UserError for none, several or an unknown one."""
    if not found:
        raise UserError(f"{path}: no DICOM series in this folder; name a file or another folder")
    if not wanted and len(found) > 1:
        listed = "; ".join(f"{uid} ({len(files)} files)" for uid, files in sorted(found.items()))
        raise UserError(
            f"{path}: {len(found)} DICOM series in one folder: {listed}; "
            "choose one as FOLDER#SERIES_UID"
        )
    if wanted and wanted not in found:
        raise UserError(f"{path}: no series {wanted!r} here; it has {', '.join(sorted(found))}")
    return wanted or next(iter(found))
