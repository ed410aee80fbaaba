"""The three planes of a volume, and the embeddings of their slices within a limit of memory."""

import logging
from collections.abc import Sequence

import numpy as np

from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.volume import VolumePredictor
from medsam_jax.io.geometry import anisotropic_axis

log = logging.getLogger(__name__)

_MOST_EMBEDDINGS = 512 << 20  # bytes of a volume


class Planes:
    """A `VolumePredictor` for each plane of a volume, made when it is first asked for.

    Args:
      array: [X, Y, Z] or [X, Y, Z, 3], in array order.
      spacing: mm along each axis.

    Attributes:
      axis: that the plane which was looked at last is cut across.

    Raises:
      UserError: see `VolumePredictor.set_volume`.
    """

    def __init__(
        self,
        predictor: Predictor,
        array: np.ndarray,
        spacing: Sequence[float],
        modality: str | None,
    ):
        self._predictor, self._modality = predictor, modality
        self._array, self._spacing = array, tuple(spacing)
        self._volumes: dict[int, VolumePredictor] = {}
        self.axis = anisotropic_axis(array.shape[:3], self._spacing) or 0
        self._focus = {self.axis: array.shape[self.axis] // 2}  # axis -> slice looked at last
        self.plane(self.axis)  # what is wrong with the volume is said now

    def plane(self, axis: int) -> VolumePredictor:
        """Returns the predictor of the slices across an axis."""
        if axis not in self._volumes:
            order = [axis, *(other for other in range(3) if other != axis)]
            # Slice by slice, so that a click waits for the one that it is on.
            volume = VolumePredictor(self._predictor, batch_size=1, show_progress=False)
            steps = [self._spacing[other] for other in order]
            moved = np.moveaxis(self._array, axis, 0)
            volume.set_volume(moved, self._modality, None, steps, "image")
            self._volumes[axis] = volume
        return self._volumes[axis]

    def look_at(self, axis: int, index: int) -> None:
        """Notes the slice around which others are encoded and kept."""
        self.axis = axis
        self._focus[axis] = index

    def encode_next(self) -> bool:
        """Encodes the slice nearest to that looked at last; False where all are ready."""
        volume, focus = self.plane(self.axis), self._focus[self.axis]
        ready = set(volume.encoded)
        near = sorted(range(len(volume.slices)), key=lambda index: abs(index - focus))
        for index in near[: self._most_slices()]:
            if index not in ready:
                volume.encode(index)
                self.limit_embeddings()
                return True
        return False

    def limit_embeddings(self) -> None:
        """Frees the slices that are farthest from those looked at, other planes first."""
        kept = [
            (axis != self.axis, abs(index - self._focus.get(axis, 0)), axis, index)
            for axis, volume in self._volumes.items()
            for index in volume.encoded
        ]
        for _, _, axis, index in sorted(kept)[self._most_slices() :]:
            self._volumes[axis].forget(index)

    def _most_slices(self) -> int:
        for volume in self._volumes.values():
            for index in volume.encoded[:1]:
                return max(_MOST_EMBEDDINGS // volume.encode(index).embedding.nbytes, 1)
        return 1


def guess_modality(array: np.ndarray) -> str | None:
    """Returns "CT" for values that look like Hounsfield units, and says so in the log."""
    if array.dtype.kind in "if" and array.min() <= -500 and array.max() <= 32767:
        log.warning("the values look like Hounsfield units and are taken as CT; see --modality")
        return "CT"
    log.warning("the values are not Hounsfield units; percentiles of the scan are used")
    return None
