"""One user's volume: its three planes, the prompts of the present object, and their mask."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from medsam_jax.data.prompts import box_from_mask
from medsam_jax.errors import UserError
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.prompt_file import arguments
from medsam_jax.serving.interactions import Interaction, slice_prompts, with_rest
from medsam_jax.serving.planes import Planes

_MOST_UNDO = 20


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """State of an object before an interaction."""

    interactions: tuple[Interaction, ...]
    initial: Bool[np.ndarray, "x y z"] | None
    bits: np.ndarray  # the packed mask


class VolumeSession:
    """Answers prompts that arrive one at a time and accumulate.

    The plane of an object is that of its first prompt. There `VolumePredictor` follows the object
    through the slices, between prompts from both of them. Prompts in another plane, and all prompts
    on an initial mask, correct their own slices. Not thread-safe: one thread makes all calls.

    Args:
      array: [X, Y, Z] or [X, Y, Z, 3], in array order.
      spacing: mm along each axis.
      takes_points: whether the weights answer points; otherwise they are refused.

    Raises:
      UserError: see `VolumePredictor.set_volume`.
    """

    def __init__(
        self,
        predictor: Predictor,
        array: np.ndarray,
        spacing: Sequence[float],
        modality: str | None,
        takes_points: bool,
    ):
        self.shape = array.shape[:3]
        self.follow = True
        self.takes_points = takes_points
        self._planes = Planes(predictor, array, spacing, modality)
        self.reset()

    @property
    def axis(self) -> int:
        """The axis across which the last prompt's plane is cut."""
        return self._planes.axis

    def reset(self) -> None:
        """Forgets the object."""
        self.interactions: tuple[Interaction, ...] = ()
        self.initial: np.ndarray | None = None
        self.mask = np.zeros(self.shape, bool)
        self._undo: list[_Step] = []

    def prompt(self, given: Interaction, run: bool = True) -> None:
        """Takes a prompt and, unless `run` is False, answers all prompts of the object.

        Raises UserError for points that the weights do not answer, and for what
        `VolumePredictor.add_prompt` refuses; the object is then as before.
        """
        if given.points and given.paint is None and not self.takes_points:
            raise UserError("points: these weights answer boxes only; draw a box")
        self._remember()
        if not given.include:
            given = with_rest(given, self.mask)
        self.interactions += (given,)
        try:
            if run:
                self.predict()
        except Exception:
            self.undo()
            raise
        self._planes.look_at(given.axis, given.index)

    def set_initial(self, mask: np.ndarray) -> None:
        """Takes a mask that prompts will correct. Raises UserError for another shape."""
        if mask.ndim == 4 and len(mask) == 1:
            mask = mask[0]
        if mask.shape != self.shape:
            raise UserError(f"initial mask: shape {mask.shape}; the volume has {list(self.shape)}")
        self._remember()
        self.interactions, self.initial = (), mask > 0
        self.mask = self.initial.copy()

    def undo(self) -> bool:
        """Goes back by one interaction; False where there is none."""
        if not self._undo:
            return False
        step = self._undo.pop()
        self.interactions, self.initial = step.interactions, step.initial
        voxels = np.unpackbits(step.bits, count=self.mask.size)
        self.mask = voxels.reshape(self.shape).astype(bool)
        return True

    def predict(self) -> bool:
        """Answers all prompts of the object; False where there are none.

        Raises UserError for what `VolumePredictor.add_prompt` refuses; the mask is then as before.
        """
        if not self.interactions and self.initial is None:
            return False
        if not self.interactions:
            self._refine()
            return True
        mask = np.zeros(self.shape, bool) if self.initial is None else self.initial.copy()
        prompts = slice_prompts(self.interactions, self.takes_points)
        for place, (axis, slices) in enumerate(prompts.items()):
            volume = self._planes.plane(axis)
            volume.clear_prompts()
            for index, prompt in slices.items():
                volume.add_prompt(index, **arguments(prompt))
            in_plane = np.moveaxis(mask, axis, 0)
            if place == 0 and self.initial is None and self.follow:
                in_plane[:] = volume.propagate()[0]
            else:
                chosen = list(slices)
                in_plane[chosen] = volume.predict_slices()[0][chosen]
        for given in self.interactions:
            if given.paint is not None:
                np.moveaxis(mask, given.axis, 0)[given.index][given.paint] = given.include
        self.mask = mask
        self._planes.limit_embeddings()
        return True

    def _refine(self) -> None:
        """Replaces the initial mask by the answers to its boxes, slice by slice."""
        volume, mask = self._planes.plane(self.axis), np.moveaxis(self.initial, self.axis, 0)
        if not mask.any():
            return
        volume.clear_prompts()
        for index in np.flatnonzero(mask.any(axis=(1, 2))).tolist():
            volume.add_prompt(index, box=box_from_mask(mask[index]))
        self.mask = np.moveaxis(volume.predict_slices()[0], 0, self.axis).copy()
        self.initial = self.mask

    def encode_next(self) -> bool:
        """Encodes the slice nearest to the last prompt in its plane; False where all are ready."""
        return self._planes.encode_next()

    def _remember(self) -> None:
        step = _Step(self.interactions, self.initial, np.packbits(self.mask))
        self._undo = [*self._undo, step][-_MOST_UNDO:]
