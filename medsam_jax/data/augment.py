"""Optional augmentation of a slice and its label map: flips, rotation, size and intensities."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from medsam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Bounds of the random changes of a training slice. MedSAM trains without augmentation."""

    flip: float = 0.0  # probability of each of the left-right and up-down flips
    rotation: float = 0.0  # largest angle, degrees, either way
    scale: float = 0.0  # largest relative change of size: up to 1 + scale times larger or smaller
    intensity: float = 0.0  # largest relative change of contrast, and of brightness in 255

    def __post_init__(self) -> None:
        for name, fits, interval in (
            ("flip", 0 <= self.flip <= 1, "[0, 1]"),
            ("rotation", 0 <= self.rotation <= 180, "[0, 180]"),
            ("scale", 0 <= self.scale <= 3, "[0, 3]"),
            ("intensity", 0 <= self.intensity < 1, "[0, 1)"),
        ):
            if not fits:
                raise UserError(f"augmentation.{name}: {getattr(self, name)} is not in {interval}")


def augment(
    image: np.ndarray,
    labels: np.ndarray,
    valid_shape: np.ndarray,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Augments the valid part of an image [S, S, 3] and its labels [S, S]; padding is not moved.

    A rotation and change of size that would leave no object in the picture are skipped.
    """
    height, width = int(valid_shape[0]), int(valid_shape[1])
    new_image, new_labels = image.copy(), labels.copy()
    part, part_labels = image[:height, :width], labels[:height, :width]
    for axis in (0, 1):
        if rng.random() < augmentation.flip:
            part, part_labels = np.flip(part, axis), np.flip(part_labels, axis)
    if augmentation.rotation > 0 or augmentation.scale > 0:
        angle = rng.uniform(-augmentation.rotation, augmentation.rotation)
        size = (1 + augmentation.scale) ** rng.uniform(-1, 1) if augmentation.scale > 0 else 1.0
        part, part_labels = _warp(part, part_labels, angle, size)
    if augmentation.intensity > 0:
        contrast, brightness = rng.uniform(-augmentation.intensity, augmentation.intensity, size=2)
        grey = part.astype(np.float32)
        grey = (grey - grey.mean()) * (1 + contrast) + grey.mean() + 255 * brightness
        part = np.clip(np.round(grey), 0, 255).astype(np.uint8)
    new_image[:height, :width], new_labels[:height, :width] = part, part_labels
    return new_image, new_labels


class Variants(Sequence):
    """A split's records, each once unchanged and `count - 1` times augmented.

    Item i is variant `i % count` of record `i // count`. A variant is the same at every reading, so
    its embedding can be cached. Its draws are those of the record's place: its position, unless
    `places` names another for each record.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        augmentation: Augmentation,
        count: int,
        places: Sequence[int] | np.ndarray | None = None,
    ):
        self._records, self._augmentation, self._count = records, augmentation, count
        self._places = range(len(records)) if places is None else places

    def __len__(self) -> int:
        return len(self._records) * self._count

    def __getitem__(self, index: Any) -> dict[str, Any]:
        position, variant = divmod(int(index), self._count)
        record = self._records[position]
        if variant == 0:
            return record
        rng = np.random.default_rng([int(self._places[position]), variant])
        unchanged = record["image"], record["mask"][:, :, 0], record["valid_shape"]
        image, labels = augment(*unchanged, self._augmentation, rng)
        return {**record, "image": image, "mask": labels[:, :, None]}


def _warp(
    image: np.ndarray, labels: np.ndarray, angle: float, size: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rotates and scales about the centre: image bilinear, labels nearest, black outside."""
    import cv2

    height, width = labels.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, size)
    warped = cv2.warpAffine(
        np.ascontiguousarray(labels), matrix, (width, height), flags=cv2.INTER_NEAREST
    )
    if not warped.any():
        return image, labels
    return cv2.warpAffine(np.ascontiguousarray(image), matrix, (width, height)), warped
