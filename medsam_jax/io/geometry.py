"""Volume on its grid in patient space: slices, comparison and resampling of grids."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medsam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scan:
    """Volume or picture with its geometry.

    A picture is a volume of one slice. `affine` holds SimpleITK's origin, spacing and direction in
    x, y, z order; None if the file has no geometry. `notes` has one sentence for each decision
    that a reader made and that another reader could make otherwise. `label_names` are those that
    the file of a mask holds.
    """

    array: np.ndarray  # [Z, Y, X] or [Z, Y, X, 3]
    spacing: tuple[float, float, float]  # (z, y, x), mm; NaN where unknown
    affine: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] | None
    path: str
    notes: tuple[str, ...] = ()
    label_names: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def to_ras(self) -> np.ndarray:
        """Returns NIfTI's affine [3, 4]: voxel index (x, y, z) to mm, x to the right. Needs one."""
        origin, spacing, direction = self.affine
        turn = np.reshape(direction, (3, 3)) * spacing
        return np.array([[-1.0], [-1.0], [1.0]]) * np.hstack([turn, np.reshape(origin, (3, 1))])

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


def slice_axis(scan: Scan) -> int:
    """Returns the out-of-plane array axis (0, 1 or 2), across which a volume is cut into slices.

    It is the axis whose spacing is largest by more than 10 %. If there is none, it is the axis
    along the patient's feet-to-head direction, or 0 without geometry. If one axis has
    length 1, it is that axis.
    """
    spacing = (np.nan,) * 3 if scan.affine is None else scan.spacing
    axis = anisotropic_axis(scan.array.shape[:3], spacing)
    if axis is not None:
        return axis
    if scan.affine is None:
        return 0
    feet_to_head = np.abs(np.reshape(scan.affine[2], (3, 3))[2])  # per x, y, z index axis
    return 2 - int(np.argmax(feet_to_head))


def anisotropic_axis(shape: Sequence[int], spacing: Sequence[float]) -> int | None:
    """Returns the one axis of length 1, or that whose spacing is largest by more than 10 %."""
    singles = [axis for axis in range(3) if shape[axis] == 1]
    if len(singles) == 1:
        return singles[0]
    order = np.argsort(spacing)
    return int(order[2]) if spacing[order[2]] > 1.1 * spacing[order[1]] else None


def slice_spacing(scan: Scan, axis: int) -> tuple[float, float, float]:
    """Returns mm between slices, rows and columns of a volume cut across `axis`; NaN if unknown."""
    order = [axis, *(other for other in range(3) if other != axis)]
    return tuple(float(scan.spacing[index]) for index in order)


def same_grid(mask: Scan, scan: Scan) -> bool:
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
    return bool(apart < 0.1 * min(scan.affine[1]) and turned < 1e-3)


def shear_degrees(axes: np.ndarray) -> float:
    """Returns by how many degrees the angle of two axes, the columns of [3, 3+], is off 90.

    It is 0 where an axis has no length.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged headers
        lengths = np.linalg.norm(axes[:, :3], axis=0)
        if not lengths.all():
            return 0.0
        steps = axes[:, :3] / lengths
        cosines = np.abs(np.triu(steps.T @ steps, 1)).max()
    return float(np.degrees(np.arcsin(min(cosines, 1.0))))


def resample(mask: Scan, scan: Scan) -> np.ndarray:
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


def share_outside(mask: Scan, scan: Scan) -> float:
    """Returns the share of a mask's labelled voxels whose centres are outside the image."""
    to_image = np.linalg.inv(np.vstack([scan.to_ras(), [0, 0, 0, 1]]))
    matrix = (to_image @ np.vstack([mask.to_ras(), [0, 0, 0, 1]]))[:3]
    size = np.array(scan.array.shape[2::-1])
    total = outside = 0
    for z, plane in enumerate(mask.array):
        y, x = np.nonzero(plane)
        places = matrix[:, :2] @ np.stack([x, y]) + (matrix[:, 2] * z + matrix[:, 3])[:, None]
        is_in = ((places > -0.5 - 1e-3) & (places < size[:, None] - 0.5 + 1e-3)).all(axis=0)
        total += len(x)
        outside += int(np.count_nonzero(~is_in))
    return outside / total if total else 0.0


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
