"""Reads medical formats with SimpleITK: one image, its array and geometry."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.geometry import Scan, shear_degrees
from medsam_jax.io.quiet import quiet

# Known by their bytes, so none of their files comes here whole; some go by the name, and crash.
_READ_ELSEWHERE = ("JPEG2000ImageIO", "JPEGImageIO", "PNGImageIO", "TIFFImageIO", "BMPImageIO")
_READ_ELSEWHERE += ("NiftiImageIO", "NrrdImageIO", "MetaImageIO", "GDCMImageIO")
_MOST_SHEAR = 0.1  # degrees: 512 voxels then drift by less than one


def read_sitk(path: str, image_io: str = "", colours: str = "") -> Scan:
    """Reads a file by the ITK reader of that name; by default ITK chooses.

    Args:
      path: the file.
      image_io: such as "NiftiImageIO". The file may then have any name.
      colours: "RGB" or "RGBA" if the header says that the values of a voxel are colours; see
        `from_sitk`.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    if image_io:
        reader.SetImageIO(image_io)
    elif reader.GetImageIOFromFileName(path) in _READ_ELSEWHERE:
        raise UserError(
            f"{path}: cannot be read (its beginning is damaged, and not that of its name); copy "
            "the file again"
        )
    try:
        with no_warnings(), quiet():
            image = reader.Execute()
    except RuntimeError as error:
        why = reason(error)
        if "Unable to determine ImageIO" in why:
            why = "its first bytes are of no known format"
        raise UserError(
            f"{path}: cannot be read ({why}); the file is truncated or not an image "
            "format known here (NIfTI, NRRD, MetaImage, DICOM, PNG, JPEG, TIFF)"
        ) from None
    return from_sitk(image, path, colours)


def reason(error: Exception) -> str:
    """Returns the last informative line of an ITK exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR:").strip()[:160] if lines else "unknown reason"


def from_sitk(image: Any, path: str, colours: str = "") -> Scan:
    """Returns array and geometry of a SimpleITK image; 2D becomes one slice, 4D is refused.

    Three unsigned values a voxel are colours, so are four if `colours` is "RGBA"; alpha is dropped.

    Raises:
      UserError: four dimensions, values of a voxel that are no colours, complex voxels, sheared
        axes.
    """
    import SimpleITK as sitk

    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    if image.GetDimension() > 3:
        size = " x ".join(str(side) for side in image.GetSize())
        raise UserError(
            f"{path}: has {image.GetDimension()} dimensions ({size}); save the 3D volumes (time "
            "points, channels) as files of their own and list each as a case"
        )
    is_flat = image.GetDimension() == 2
    if is_flat:
        image = sitk.JoinSeries(image)
    array = sitk.GetArrayFromImage(image)
    channels = image.GetNumberOfComponentsPerPixel()
    if channels > 1:
        array = _colours(array, channels, colours, path)
    if array.dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels are {array.dtype}; save integers or floats")
    affine = (image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    if not np.isfinite(np.concatenate(affine)).all():
        raise UserError(f"{path}: its position has NaN or infinity; write the scan's geometry")
    shear = shear_degrees(np.reshape(affine[2], (3, 3)))
    if shear > _MOST_SHEAR:
        raise UserError(
            f"{path}: the axes are sheared by {shear:.2g} degrees; resample the scan to orthogonal "
            "axes"
        )
    spacing = tuple(reversed(image.GetSpacing()))
    return Scan(array, (float("nan"), *spacing[1:]) if is_flat else spacing, affine, path)


def _colours(array: np.ndarray, channels: int, colours: str, path: str) -> np.ndarray:
    """Returns the three colours of each voxel [Z, Y, X, 3]. Raises UserError for other values."""
    if channels not in (3, 4) or (channels == 4 and colours != "RGBA"):
        raise UserError(f"{path}: has {channels} values per voxel; save them as files each")
    if array.dtype.kind != "u" and not colours:
        raise UserError(
            f"{path}: has 3 values of type {array.dtype} per voxel, which are no colours (a "
            "vector field, or channels); save each as a file of its own"
        )
    return array[..., :3]


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Turns off ITK's warnings about missing series and uneven slices; our errors replace them."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
