"""Masks of a whole volume from prompts on some of its slices.

The models are two-dimensional: slices are encoded in batches and their embeddings kept. A slice
without a prompt gets a box: from the neighbouring slice's mask (`propagate`), or interpolated
between boxes on key slices (`interpolate`).
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from medsam_jax.cli import progress
from medsam_jax.data.prompts import box_from_mask
from medsam_jax.errors import UserError
from medsam_jax.inference.predictor import EncodedImage, Predictor
from medsam_jax.inference.prompts import read_prompts


@dataclasses.dataclass(eq=False)
class VolumePredictor:
    """Segments one object in a volume from prompts on some of its slices.

    Longer than other classes here: the rule of `propagate` and the arguments that set it belong
    together.

    Args:
      model: a `Sam`, a `UNet`, or a `Predictor` whose compiled programs are shared.
      elongation: expected length of an object through the slices, in parts of its longest side on
        the prompted slice. Beyond the outermost prompts boxes taper as those of an ellipsoid of
        that length do, and propagation ends where it ends. None: no length is expected.
      margin: pixels that a neighbour's box is grown by on each side, so that objects may grow.
      least_score: propagation stops where the predicted IoU falls below it.
      least_overlap: propagation stops where a mask shares less than this part of the smaller of
        itself and its neighbour's mask.
      most_growth: propagation stops where a mask is more than this factor larger than its
        neighbour's.
      batch_size: slices that are encoded together.
      show_progress: draw bars on stderr.
    """

    model: dataclasses.InitVar[nnx.Module | Predictor]
    elongation: float | None = 1.5
    margin: int = 1
    least_score: float = 0.5
    least_overlap: float = 0.5
    most_growth: float = 2.0
    batch_size: int = 8
    show_progress: bool = True

    def __post_init__(self, model: nnx.Module | Predictor):
        self.predictor = Predictor.of(model)
        self._slices: np.ndarray | None = None
        self._spacing = np.ones(3)
        self._encoded: dict[int, EncodedImage] = {}
        self._prompts: dict[int, dict[str, Any]] = {}

    def set_volume(
        self,
        volume: np.ndarray,
        modality: str | None = None,
        window: str | None = None,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        name: str = "volume",
    ) -> None:
        """Takes a volume and forgets the prompts of the one before.

        Args:
          volume: [Z, H, W] or [Z, H, W, 3], cut into slices along Z; HU or scanner units.
          modality, window: as `Predictor.set_image`; limits are those of the whole volume.
          spacing: mm between slices, rows and columns, of which `propagate` uses the ratios. By
            default voxels are cubes.
          name: of the volume, in warnings.

        Raises:
          UserError: see `Predictor.set_image`; a spacing that is not three positive numbers.
        """
        steps = np.asarray(spacing, float)
        if steps.shape != (3,) or not np.isfinite(steps).all() or not (steps > 0).all():
            raise UserError(f"spacing: {spacing}; give mm between slices, rows and columns")
        volume = np.asarray(volume)
        if not (volume.ndim == 3 or (volume.ndim == 4 and volume.shape[3] == 3)):
            raise UserError(f"volume: shape {volume.shape}; give [Z, H, W] or [Z, H, W, 3]")
        # One tall image: intensity rules look at values, not at places.
        tall = volume.reshape(-1, *volume.shape[2:])
        self._slices = self.predictor.normalise(tall, modality, window, name).reshape(volume.shape)
        self._spacing = steps
        self._encoded, self._prompts = {}, {}

    def save_embeddings(self, path: str | os.PathLike) -> None:
        """Writes the slices that were encoded so far to an `.npz`: 4 MB a slice (LiteMedSAM).

        Raises UserError where none was encoded or the file cannot be written.
        """
        shape = self.slices.shape
        if not self._encoded:
            raise UserError("no slice is encoded; predict first, then save the embeddings")
        order = sorted(self._encoded)
        self.predictor.use([self._encoded[index] for index in order])
        self.predictor.save_embedding(path, slices=order, volume_shape=shape)

    def load_embeddings(self, path: str | os.PathLike) -> None:
        """Takes the slices of a file by `save_embeddings`, for the volume that is set.

        Raises UserError as `Predictor.load_embedding`, and for a volume of another size.
        """
        shape = self.slices.shape
        notes = self.predictor.load_embedding(path)
        if tuple(notes.get("volume_shape", ())) != shape:
            raise UserError(f"{path}: made of another volume; encode this one again")
        self._encoded = dict(zip(notes["slices"].tolist(), self.predictor.images, strict=True))

    def encode(self, index: int) -> EncodedImage:
        """Returns the slice's embedding, encoded in a batch with its neighbours and kept."""
        if index not in self._encoded:
            first = index - index % self.batch_size
            block = range(first, min(first + self.batch_size, len(self.slices)))
            encoded = self.predictor.engine.encode([self.slices[i] for i in block])
            self._encoded |= dict(zip(block, encoded, strict=True))
        return self._encoded[index]

    @property
    def encoded(self) -> list[int]:
        """The slices whose embeddings are kept."""
        return sorted(self._encoded)

    def forget(self, index: int) -> None:
        """Frees the embedding of a slice; a prompt that needs it encodes the slice again."""
        self._encoded.pop(index, None)

    def add_prompt(
        self, slice_index: int, point_coords: Any = None, point_labels: Any = None, box: Any = None
    ) -> None:
        """Sets points or a box of the object on one slice, arguments as of `Predictor.predict`.

        A prompt that the slice had before is replaced. Raises UserError where no volume is set, it
        has no such slice, or the prompt is not one of a single object; see `read_prompts`.
        """
        slices = self.slices
        if not isinstance(slice_index, int | np.integer) or not 0 <= slice_index < len(slices):
            raise UserError(f"slice {slice_index}: the volume has slices 0 to {len(slices) - 1}")
        prompt = {"point_coords": point_coords, "point_labels": point_labels, "box": box}
        read = read_prompts(slices.shape[1:3], 0, **prompt)
        if read.count > 1:
            raise UserError("prompt: of several objects; add one, and clear_prompts for the next")
        if read.boxes is not None:
            prompt["box"] = read.boxes[0]
        self._prompts[int(slice_index)] = {k: v for k, v in prompt.items() if v is not None}

    def clear_prompts(self) -> None:
        """Forgets the prompts and keeps the volume, for another object in it."""
        self._prompts = {}

    @property
    def slices(self) -> np.ndarray:
        """The volume as uint8 [Z, H, W] or [Z, H, W, 3], after the intensity rule.

        Raises UserError where no volume is set.
        """
        if self._slices is None:
            raise UserError("no volume is set; call set_volume first")
        return self._slices

    def predict_slices(self) -> tuple[Bool[np.ndarray, "z h w"], Float[np.ndarray, " z"]]:
        """Returns masks of the prompted slices only, and their predicted IoU (NaN elsewhere)."""
        mask, scores = self._empty()
        for index, prompt in self._progress(self._prompts.items(), "slices"):
            mask[index], scores[index] = self._predict(index, prompt)
        return mask, scores

    def propagate(self) -> tuple[Bool[np.ndarray, "z h w"], Float[np.ndarray, " z"]]:
        """Goes from each prompted slice to both sides until the object ends.

        All prompts go on by one slice in turn, lower slices first, until they meet: a slice between
        two prompts is answered from the nearer one, from the lower one half-way, and from the other
        where the object was lost on the nearer one's way. The order of `add_prompt` has no effect.

        A slice's box is the mean of its neighbour's box and the box of its neighbour's mask. The
        latter is grown by `margin`, and by the distances between the given box and its own mask,
        because boxes of masks alone shrink from slice to slice. Beyond the outermost prompts, the
        sides of the box are the geometric means of these sides and those of an ellipsoid at that
        place. Its largest section is the prompt, and `elongation` sets its length. So prompt the
        slice on which the object is largest. The class says where propagation stops, and
        `docs/inference.md` how the rule was chosen.

        Returns:
          mask [Z, H, W] and the predicted IoU of each slice (NaN: not reached).
        """
        mask, scores = self.predict_slices()
        reached = np.zeros(len(mask), bool)
        reached[list(self._prompts)] = True
        walks = [
            self._walk(start, step, mask, scores, reached)
            for start in sorted(self._prompts)
            for step in (1, -1)
        ]
        for _ in self._progress(itertools.zip_longest(*walks), "propagated slices to each side"):
            pass
        return mask, scores

    def _progress(self, items: Iterable[Any], desc: str) -> Iterable[Any]:
        return progress(items, desc) if self.show_progress else items

    def _walk(
        self, start: int, step: int, mask: np.ndarray, scores: np.ndarray, reached: np.ndarray
    ) -> Iterator[int]:
        """Fills in slice after slice until it meets one that another walk reached; yields each."""
        if not mask[start].any():
            return
        height, width = mask.shape[1:]
        grow = np.array([-self.margin, -self.margin, self.margin, self.margin])
        around = box_from_mask(mask[start])
        given = self._prompts[start].get("box", around)
        box, taper, index = given, 1.0, start + step
        reach = self._reach(start, step, given)
        while 0 <= index < len(mask) and not reached[index]:
            neighbour = mask[index - step]
            box = (box + box_from_mask(neighbour) + grow + taper * (given - around)) / 2
            if reach is not None:
                if abs(index - start) >= reach:
                    return
                taper = math.sqrt(1 - (abs(index - start) / reach) ** 2)
                box = _resized(box, np.sqrt(_sides(box) * _sides(given) * taper))
            box = np.clip(box, 0, [width - 1, height - 1] * 2)
            found, score = self._predict(index, {"box": box})
            if score < self.least_score or not self._continues(found, neighbour):
                return
            mask[index], scores[index], reached[index] = found, score, True
            yield index
            index += step

    def _reach(self, start: int, step: int, box: np.ndarray) -> float | None:
        """Slices from the prompted one to the object's expected end; None towards a prompt."""
        if self.elongation is None or any((other - start) * step > 0 for other in self._prompts):
            return None
        longest = (_sides(box) * self._spacing[[2, 1]]).max()
        return self.elongation * longest / 2 / self._spacing[0]

    def _continues(self, found: np.ndarray, neighbour: np.ndarray) -> bool:
        area, before, shared = map(np.count_nonzero, (found, neighbour, found & neighbour))
        is_similar = shared >= self.least_overlap * min(area, before)
        return bool(0 < area <= self.most_growth * before and is_similar)

    def interpolate(self) -> tuple[Bool[np.ndarray, "z h w"], Float[np.ndarray, " z"]]:
        """Segments from the first to the last prompted slice, by boxes interpolated linearly.

        Raises UserError for a prompt without a box, or fewer than two.
        """
        mask, scores = self._empty()
        prompts = self._prompts
        keys = sorted(prompts)
        if len(keys) < 2 or any("box" not in prompts[key] for key in keys):
            raise UserError("interpolate: give boxes on two slices or more")
        boxes = np.array([prompts[key]["box"] for key in keys], np.float32)
        for index in self._progress(range(keys[0], keys[-1] + 1), "slices"):
            box = [np.interp(index, keys, boxes[:, side]) for side in range(4)]
            mask[index], scores[index] = self._predict(index, {"box": box})
        return mask, scores

    def _predict(self, index: int, prompt: dict[str, Any]) -> tuple[np.ndarray, float]:
        self.predictor.use([self.encode(index)])
        masks, scores, _ = self.predictor.predict(**prompt, multimask_output=False)
        return masks[0], float(scores[0])

    def _empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Mask and scores to fill in. Raises UserError where there is no volume or no prompt."""
        shape = self.slices.shape[:3]
        if not self._prompts:
            raise UserError("no prompt is given; call add_prompt first")
        return np.zeros(shape, bool), np.full(shape[0], np.nan)


def _sides(box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "2"]:
    """Width and height in pixels; both edges belong to the box."""
    return np.maximum(box[2:] - box[:2] + 1, 1)


def _resized(box: Float[np.ndarray, "4"], sides: Float[np.ndarray, "2"]) -> Float[np.ndarray, "4"]:
    """The box with the same centre and other sides."""
    centre, half = (box[:2] + box[2:]) / 2, (sides - 1) / 2
    return np.concatenate([centre - half, centre + half])


def clean(
    mask: Bool[np.ndarray, "z h w"], largest: bool = True, holes: bool = True
) -> Bool[np.ndarray, "z h w"]:
    """Keeps the largest 26-connected component, and fills holes enclosed in three dimensions.

    In a single slice, a picture, holes enclosed in two dimensions are filled.
    """
    from scipy import ndimage

    if largest and mask.any():
        components, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        mask = components == np.bincount(components[mask]).argmax()
    if not holes:
        return mask
    if len(mask) == 1:
        return ndimage.binary_fill_holes(mask[0])[None]
    return ndimage.binary_fill_holes(mask)
