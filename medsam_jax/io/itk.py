"""Reads medical formats (NIfTI, NRRD, MetaImage, single DICOM files) with SimpleITK."""

import contextlib
from collections.abc import Iterator
from typing import Any

from medsam_jax.errors import UserError
from medsam_jax.io.geometry import Scan


def read_sitk(path: str) -> Scan:
    import SimpleITK as sitk

    try:
        with no_warnings():
            image = sitk.ReadImage(path)
    except RuntimeError as error:
        raise UserError(
            f"{path}: cannot be read ({reason(error)}); the file is truncated or not an image "
            "format known here (NIfTI, NRRD, MetaImage, DICOM, PNG, JPEG, TIFF)"
        ) from None
    return from_sitk(image, path)


def reason(error: Exception) -> str:
    """Returns the last informative line of an ITK exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR:").strip()[:160] if lines else "unknown reason"


def from_sitk(image: Any, path: str) -> Scan:
    """Returns array and geometry of a SimpleITK image; 2D becomes one slice, 4D is refused."""
    import SimpleITK as sitk

    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() > 3:
        size = " x ".join(str(side) for side in image.GetSize())
        raise UserError(
            f"{path}: has {image.GetDimension()} dimensions ({size}); save the 3D volumes (time "
            "points, channels) as files of their own and list each as a case"
        )
    if image.GetDimension() == 2:
        image = sitk.JoinSeries(image)
    array = sitk.GetArrayFromImage(image)
    channels = image.GetNumberOfComponentsPerPixel()
    if channels > 1:
        if channels not in (3, 4):
            raise UserError(f"{path}: has {channels} values per voxel; save them as files each")
        array = array[..., :3]
    affine = (image.GetOrigin(), image.GetSpacing(), image.GetDirection())
    return Scan(array, tuple(reversed(image.GetSpacing())), affine, path)


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
