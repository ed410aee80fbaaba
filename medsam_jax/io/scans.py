"""Reads scans and label maps of any common format into arrays with their geometry.

SimpleITK reads medical formats (NIfTI, NRRD, MetaImage, DICOM), Pillow reads pictures (PNG, JPEG,
TIFF), NumPy reads MedSAM's `.npz`. Arrays and spacings are both in (z, y, x) order; spacings in
another order would make surface metrics wrong.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io import nifti, pictures


@dataclasses.dataclass(frozen=True)
class Scan:
    """Volume or picture with its geometry.

    A picture is a volume of one slice. `affine` holds SimpleITK's origin, spacing and direction in
    x, y, z order; None if the file has no geometry.
    """

    array: np.ndarray  # [Z, Y, X] or [Z, Y, X, 3]
    spacing: tuple[float, float, float]  # (z, y, x), mm; NaN where unknown
    affine: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] | None
    path: str

    def to_image(self, array: np.ndarray) -> Any:
        """Returns a SimpleITK image of `array` [Z, Y, X] on this scan's grid."""
        import SimpleITK as sitk

        image = sitk.GetImageFromArray(array)
        if self.affine is not None:
            origin, spacing, direction = self.affine
            image.SetOrigin(origin)
            image.SetSpacing(spacing)
            image.SetDirection(direction)
        return image


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
    elif not _same_grid(mask, scan):
        labels = _resample(dataclasses.replace(mask, array=labels), scan)
    if not labels.any():
        raise UserError(f"{path}: the mask is empty (no voxel above 0); leave this case out")
    return labels


def _size(array: np.ndarray) -> str:
    return " x ".join(str(side) for side in reversed(array.shape[:3]))


def _read(path: str, as_labels: bool) -> Scan:
    """Calls the reader for the type of the path; with `as_labels`, colours become labels."""
    file = pathlib.Path(path.split("#")[0])
    if not file.exists():
        raise UserError(f"{path}: does not exist; correct the path")
    if file.is_dir():
        return _read_dicom_series(path)
    if file.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); copy the file again")
    suffix = file.suffix.lower()
    if suffix in pictures.SUFFIXES:
        array = pictures.read_labels(file) if as_labels else pictures.read_picture(file)
        return Scan(array, (float("nan"),) * 3, None, path)
    if suffix == ".npz":
        return _read_npz(path, "gts" if as_labels else "imgs")
    if file.name.lower().endswith((".nii", ".nii.gz")):
        nifti.check_nifti(file)
    return _read_sitk(path)


def _read_sitk(path: str) -> Scan:
    import SimpleITK as sitk

    try:
        with _no_itk_warnings():
            image = sitk.ReadImage(path)
    except RuntimeError as error:
        raise UserError(
            f"{path}: cannot be read ({_reason(error)}); the file is truncated or not an image "
            "format known here (NIfTI, NRRD, MetaImage, DICOM, PNG, JPEG, TIFF)"
        ) from None
    return _from_sitk(image, path)


def _reason(error: Exception) -> str:
    """Returns the last informative line of an ITK exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR:").strip()[:160] if lines else "unknown reason"


def _from_sitk(image: Any, path: str) -> Scan:
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


def is_dicom(path: str) -> bool:
    """Returns whether a path is read as DICOM: a folder, or a file with suffix .dcm."""
    file = pathlib.Path(path.split("#")[0])
    return file.is_dir() or file.suffix.lower() == ".dcm"


def list_series(folder: str | pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Maps the UID of each DICOM series directly in a folder to its files in slice order."""
    import SimpleITK as sitk

    with _no_itk_warnings():
        uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        return {
            uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in uids
        }


def dicom_files(path: str) -> tuple[str, ...]:
    """Returns the files of a DICOM path (`is_dicom`), one per slice, in the array's slice order.

    Raises:
      UserError: no series, or several and none chosen.
    """
    folder, _, wanted = path.partition("#")
    if not pathlib.Path(folder).is_dir():
        return (path,)
    found = list_series(folder)
    return found[_choose_series(path, wanted, found)]


def _read_dicom_series(path: str) -> Scan:
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.SetFileNames(dicom_files(path))
    with _no_itk_warnings():
        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise UserError(
                f"{path}: the series cannot be read ({_reason(error)}); export it again"
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
    return _from_sitk(image, path)


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


@contextlib.contextmanager
def _no_itk_warnings() -> Iterator[None]:
    """Turns off ITK's warnings about missing series and uneven slices; our errors replace them."""
    import SimpleITK as sitk

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def _read_npz(path: str, key: str) -> Scan:
    """Reads MedSAM's `.npz`: `imgs` and `gts` [Z, Y, X] or a picture, `spacing` as (x, y, z)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file.files)
            array = file[key] if key in names else None
            spacing = file["spacing"] if "spacing" in names else None
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as .npz ({_reason(error)}); write it again"
        ) from None
    except Exception as error:  # zipfile.BadZipFile and zlib.error share no base class
        raise UserError(f"{path}: damaged .npz ({_reason(error)}); write it again") from None
    if array is None:
        raise UserError(f"{path}: has no array {key!r} (found {', '.join(names)})")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3 and spacing is None):
        array = array[None]
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3):
        raise UserError(f"{path}: {key} has shape {array.shape}; expected [Z, Y, X] or [Y, X, 3]")
    if spacing is None or len(spacing) != 3:
        return Scan(array, (float("nan"),) * 3, None, path)
    xyz = tuple(float(value) for value in spacing)
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    return Scan(array, xyz[::-1], ((0.0, 0.0, 0.0), xyz, identity), path)


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


def _same_grid(mask: Scan, scan: Scan) -> bool:
    """Returns whether the grids agree: first and last voxel within a tenth of a voxel."""
    if mask.array.shape[:3] != scan.array.shape[:3]:
        return False
    last = np.array(scan.array.shape[2::-1]) - 1  # x, y, z index of the last voxel
    far, near = [], []
    for origin, spacing, direction in (mask.affine, scan.affine):
        near.append(np.array(origin))
        far.append(np.array(origin) + np.reshape(direction, (3, 3)) @ (last * np.array(spacing)))
    apart = max(np.abs(near[0] - near[1]).max(), np.abs(far[0] - far[1]).max())
    turned = np.abs(np.subtract(mask.affine[2], scan.affine[2])).max()
    return bool(apart < 0.1 * min(scan.spacing) and turned < 1e-3)


def _resample(mask: Scan, scan: Scan) -> np.ndarray:
    """Returns `mask` at the voxel centres of `scan`. Raises UserError if nothing overlaps."""
    import SimpleITK as sitk

    moving, fixed = (
        mask.to_image(mask.array),
        scan.to_image(np.zeros(scan.array.shape[:3], np.uint8)),
    )
    resampled = sitk.Resample(moving, fixed, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    labels = sitk.GetArrayFromImage(resampled)
    if mask.array.any() and not labels.any():
        raise UserError(
            f"{mask.path}: the mask does not overlap the image {scan.path} "
            f"(mask {_extent(moving)}, image {_extent(fixed)}, mm); pair the right files, or copy "
            "the image's geometry into the mask"
        )
    return labels


def _extent(image: Any) -> str:
    """Returns the x, y, z bounding box of a SimpleITK image's voxel centres in patient space."""
    last = [side - 1 for side in image.GetSize()]
    points = [
        image.TransformIndexToPhysicalPoint(
            [end if bit >> axis & 1 else 0 for axis, end in enumerate(last)]
        )
        for bit in range(8)
    ]
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    return " x ".join(f"{a:.0f}..{b:.0f}" for a, b in zip(low, high, strict=True))


def slice_axis(scan: Scan) -> int:
    """Returns the out-of-plane array axis (0, 1 or 2), across which a volume is cut into slices.

    It is the axis whose spacing is largest by more than 10 %. If there is none, it is the axis
    along the patient's feet-to-head direction, or 0 without geometry. If one axis has
    length 1, it is that axis.
    """
    singles = [axis for axis in range(3) if scan.array.shape[axis] == 1]
    if len(singles) == 1:
        return singles[0]
    if scan.affine is None:
        return 0
    order = np.argsort(scan.spacing)
    if scan.spacing[order[2]] > 1.1 * scan.spacing[order[1]]:
        return int(order[2])
    feet_to_head = np.abs(np.reshape(scan.affine[2], (3, 3))[2])  # per x, y, z index axis
    return 2 - int(np.argmax(feet_to_head))


def slice_spacing(scan: Scan, axis: int) -> tuple[float, float, float]:
    """Returns mm between slices, rows and columns of a volume cut across `axis`; NaN if unknown."""
    order = [axis, *(other for other in range(3) if other != axis)]
    return tuple(float(scan.spacing[index]) for index in order)
