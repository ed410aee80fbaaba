"""Masks for prompts on images, with the verbs of segment_anything's `SamPredictor`.

Differences: images are scans as well as pictures, prepared by the checkpoint's contract; several
images and prompts go through the model in one call; masks of several prompts keep a leading axis.
"""

import copy
import dataclasses
import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsam_jax.data.preprocess import (
    encoder_input,
    get_recipe,
    normalise_intensity,
    prompts_to_input,
    resize_image,
    restore_masks,
)
from medsam_jax.errors import UserError
from medsam_jax.inference.mask_filters import Enlargement, enlargement
from medsam_jax.inference.prompts import PARTS, Prompts, pack, read_prompts
from medsam_jax.io.files import write_whole
from medsam_jax.models.functional import Functional
from medsam_jax.models.sam import Sam
from medsam_jax.ops.compile import jit

_PROMPTS_AT_ONCE = 64  # of one image through the decoder: 0.3 GB of upscaled embeddings
_IMAGES_AT_ONCE = 8

Answer = tuple[np.ndarray, np.ndarray, np.ndarray]  # masks, scores, low_res_logits


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """What is kept of an image that was set."""

    embedding: Float[Array, "h w c"]
    original_shape: tuple[int, int]  # (H, W), pixels of the image
    valid_shape: tuple[int, int]  # (h, w), what of the stored grid is not padding


class Predictor:
    """Encodes images once and answers any number of prompts on them.

    Shapes that are compiled depend on the model and on the kinds and (rounded up) numbers of
    prompts, never on the size of an image.
    """

    def __init__(self, model: Sam):
        self.model = model
        self._functional = Functional(model)
        self._preprocessing = model.config.preprocessing
        self._recipe = get_recipe(self._preprocessing.recipe)
        self._mask_side = 4 * model.config.embedding_size
        self._images: list[EncodedImage] = []
        self._encode = jit(self._encode_arrays)
        self._decode = jax.jit(self._decode_arrays, static_argnames="multimask_output")

    @classmethod
    def of(cls, model: "Sam | Predictor") -> "Predictor":
        """A predictor without images; made from another, it shares what that one has compiled."""
        if not isinstance(model, Predictor):
            return cls(model)
        predictor = copy.copy(model)
        predictor.reset_image()
        return predictor

    def _encode_arrays(self, arrays, images, valid_shape):
        inputs = encoder_input(images, valid_shape, self._preprocessing)
        return self._functional.bind(arrays).image_encoder(inputs)

    def _decode_arrays(self, arrays, embeddings, prompts, multimask_output):
        model = self._functional.bind(arrays)
        return model.decode(embeddings, multimask_output=multimask_output, **prompts)

    def set_image(
        self, image: np.ndarray, modality: str | None = None, window: str | None = None
    ) -> None:
        """Encodes one image for the `predict` calls that follow.

        Args:
          image: [H, W] or [H, W, 3]; HU, scanner units or grey levels, any integer or float type.
            uint8 is taken as ready to see; anything else goes through the checkpoint's intensity
            rule. For a slice of a volume, normalise the volume first: its limits are the scan's.
          modality: "CT" means HU and selects a window; anything else the recipe's percentiles.
          window: a CT window of the recipe; by default the one the checkpoint was trained on.

        Raises:
          UserError: empty, NaN or infinite, of another shape, or constant where limits are needed.
        """
        self.set_images([image], modality, window)

    def set_images(
        self,
        images: Sequence[np.ndarray],
        modality: str | None = None,
        window: str | None = None,
    ) -> None:
        """As `set_image`, for several images of any sizes; then use `predict_batch`."""
        self.set_normalised([self.normalise(image, modality, window) for image in images])

    def normalise(
        self, image: np.ndarray, modality: str | None = None, window: str | None = None
    ) -> np.ndarray:
        """The uint8 image that the checkpoint's intensity rule makes; raises as `set_image`."""
        image = np.asarray(image)
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise UserError(f"image: shape {image.shape}; give [H, W] or [H, W, 3]")
        if image.size == 0:
            raise UserError(f"image: shape {image.shape} has no pixels")
        if image.dtype.kind not in "iuf":
            raise UserError(f"image: type {image.dtype}; give integers or floats")
        if not np.isfinite(image).all():
            raise UserError("image: contains NaN or infinity; replace them (with 0, or air)")
        window = self._preprocessing.ct_window(window)
        return normalise_intensity(image, modality, self._recipe, window)

    def set_normalised(self, images: Sequence[np.ndarray]) -> None:
        """As `set_images`, for uint8 images already normalised: crops, or slices of a volume."""
        if len(images) == 0:
            raise UserError("images: none given")
        self.use(self.encode(images))

    def use(self, images: Sequence[EncodedImage]) -> None:
        """Sets images that `encode` returned, now or earlier."""
        self._images = list(images)

    @property
    def images(self) -> list[EncodedImage]:
        """The images that are set, for `use`."""
        return list(self._images)

    def encode(self, images: Sequence[np.ndarray]) -> list[EncodedImage]:
        """Encodes normalised uint8 images [H, W] or [H, W, 3] without setting them."""
        stored, valid_shapes = zip(
            *(resize_image(image, self._recipe) for image in images), strict=True
        )
        shapes = [tuple(image.shape[:2]) for image in images]
        embeddings = self._encode_stored(np.stack(stored), np.array(valid_shapes, np.int32))
        parts = zip(embeddings, shapes, valid_shapes, strict=True)
        return [EncodedImage(*part) for part in parts]

    def _encode_stored(self, stored: np.ndarray, valid_shapes: np.ndarray) -> list[Array]:
        """In batches of a power of two, so that at most four batch sizes are compiled."""
        embeddings: list[Array] = []
        while len(embeddings) < len(stored):
            left = len(stored) - len(embeddings)
            size = min(_IMAGES_AT_ONCE, 1 << (left.bit_length() - 1))
            part = slice(len(embeddings), len(embeddings) + size)
            arrays = self._functional.arrays
            embeddings.extend(self._encode(arrays, stored[part], valid_shapes[part]))
        return embeddings

    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Answer:
        """Masks for prompts on the image that is set.

        Args:
          point_coords: [N, 2] of one prompt or [P, N, 2] of several: x, y in pixels of the image.
          point_labels: [N] or [P, N], 1 foreground, 0 background.
          box: [4] or [P, 4]: x0, y0, x1, y1.
          mask_input: low-resolution logits of an earlier answer, [m, m] for each prompt.
          multimask_output: three masks for each prompt, or one; three suit an ambiguous prompt.
          return_logits: logits instead of masks.

        Returns:
          masks [C, H, W] bool (or float32 logits), scores [C], low_res_logits [C, m, m]; with a
          leading axis P for several prompts.

        Raises:
          UserError: no image or several are set; see `read_prompts` for bad prompts.
        """
        if len(self._images) > 1:
            raise UserError(f"predict: {len(self._images)} images are set; use predict_batch")
        prompts = {
            "point_coords": point_coords,
            "point_labels": point_labels,
            "box": box,
            "mask_input": mask_input,
        }
        return self.predict_batch([prompts], multimask_output, return_logits)[0]

    def predict_batch(
        self,
        prompts: Sequence[Mapping[str, Any]],
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> list[Answer]:
        """As `predict` on every image that is set, one mapping of its arguments for each.

        Kinds and numbers of prompts, and of points in them, may differ: the answers are those of
        one call each.

        Raises:
          UserError: as `predict`, and for a key that is none of its arguments.
        """
        answers = self.predict_low_res(prompts, multimask_output)
        return [
            (self.restore(logits, return_logits, index), scores, logits)
            for index, (scores, logits) in enumerate(answers)
        ]

    def predict_low_res(
        self, prompts: Sequence[Mapping[str, Any]], multimask_output: bool = True
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `predict_batch`, without the masks at full size: scores and low_res_logits only."""
        images = self._require_images()
        if len(prompts) != len(images):
            raise UserError(f"predict_batch: {len(prompts)} prompts for {len(images)} images")
        for index, given in enumerate(prompts):
            if unknown := [name for name in given if name not in PARTS]:
                known = ", ".join(PARTS)
                raise UserError(f"prompts[{index}]: unknown key {unknown[0]!r}; use {known}")
        read = [
            read_prompts(image.original_shape, self._mask_side, **given)
            for image, given in zip(images, prompts, strict=True)
        ]
        moved = [self._to_input(p, image) for p, image in zip(read, images, strict=True)]
        decoded = self._decode_prompts(images, moved, multimask_output)
        return [
            (scores[0], logits[0]) if p.single else (scores, logits)
            for p, (logits, scores) in zip(read, decoded, strict=True)
        ]

    def restore(
        self,
        low_res_logits: Float[np.ndarray, "... m m"],
        return_logits: bool = False,
        index: int = 0,
    ) -> np.ndarray:
        """Masks [..., H, W] of low-resolution logits, on the pixels of the `index`-th image set."""
        image = self._require_images()[index]
        maps = low_res_logits.reshape(-1, *low_res_logits.shape[-2:])
        dtype = np.float32 if return_logits else bool
        masks = np.empty((len(maps), *image.original_shape), dtype)
        for mask, logits in zip(masks, maps, strict=True):  # one at a time: float maps are large
            mask[:] = restore_masks(
                logits, image.valid_shape, image.original_shape, self._preprocessing, return_logits
            )
        return masks.reshape(*low_res_logits.shape[:-2], *image.original_shape)

    def _to_input(self, prompts: Prompts, image: EncodedImage) -> Prompts:
        def move(coords):
            return prompts_to_input(coords, image.original_shape, self._preprocessing)

        coords = None if prompts.coords is None else move(prompts.coords)
        boxes = prompts.boxes
        if boxes is not None:
            boxes = move(boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        return dataclasses.replace(prompts, coords=coords, boxes=boxes)

    def _decode_prompts(
        self, images: Sequence[EncodedImage], prompts: Sequence[Prompts], multimask_output: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Low-resolution logits [P, C, m, m] and scores [P, C] of each image."""
        if len(images) > 1 and max(p.count for p in prompts) * len(images) > _PROMPTS_AT_ONCE:
            return [
                self._decode_prompts([image], [p], multimask_output)[0]
                for image, p in zip(images, prompts, strict=True)
            ]
        embeddings = jnp.stack([image.embedding for image in images])
        parts = []
        for start in range(0, max(p.count for p in prompts), _PROMPTS_AT_ONCE):
            chunk = [p[start : start + _PROMPTS_AT_ONCE] for p in prompts]
            packed = pack(chunk, self._mask_side)
            answer = self._decode(
                self._functional.arrays, embeddings, packed, multimask_output=multimask_output
            )
            parts.append(jax.device_get(answer))
        logits, scores = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return [(logits[i, : p.count], scores[i, : p.count]) for i, p in enumerate(prompts)]

    def decode_on_device(
        self, prompts: Prompts, count: int, multimask_output: bool
    ) -> tuple[Float[Array, "p c m m"], Float[Array, "p c"]]:
        """Low-resolution logits and scores of the one image set, without waiting for them.

        Args:
          prompts: in pixels of the image.
          count: prompts to pad to; what comes back for the padding means nothing.
        """
        [image] = self._require_images()
        packed = pack([self._to_input(prompts, image)], self._mask_side, count)
        logits, scores = self._decode(
            self._functional.arrays,
            image.embedding[None],
            packed,
            multimask_output=multimask_output,
        )
        return logits[0], scores[0]

    def pixels_per_logit(self) -> tuple[float, float]:
        """Pixels of the one image set for a low-resolution pixel, (x, y)."""
        [image] = self._require_images()
        sides = zip(image.original_shape, image.valid_shape, strict=True)
        y, x = (full / valid * self._recipe.size / self._mask_side for full, valid in sides)
        return x, y

    def enlargement(self) -> Enlargement:
        """How low-resolution logits become masks of the one image set, for `filter_masks`."""
        [image] = self._require_images()
        return enlargement(
            self._mask_side, image.valid_shape, image.original_shape, self._preprocessing
        )

    def _require_images(self) -> list[EncodedImage]:
        if not self._images:
            raise UserError("no image is set; call set_image first")
        return self._images

    def get_image_embedding(self) -> Float[Array, "b h w c"]:
        """The embeddings of the images that are set. Raises UserError without any."""
        return jnp.stack([image.embedding for image in self._require_images()])

    def reset_image(self) -> None:
        """Forgets the images that are set."""
        self._images = []

    def save_embedding(self, path: str | os.PathLike, **notes: Any) -> None:
        """Writes the images that are set to an `.npz` that `load_embedding` takes; whole or not.

        Args:
          notes: arrays to keep with them.

        Raises:
          UserError: no image is set, or the file cannot be written.
        """
        images = self._require_images()
        buffer = io.BytesIO()
        np.savez(  # floats hardly compress, and it takes longer than encoding
            buffer,
            embedding=np.asarray(self.get_image_embedding(), np.float32),
            original_shape=[image.original_shape for image in images],
            valid_shape=[image.valid_shape for image in images],
            weights=self._fingerprint(),
            **{f"note_{name}": value for name, value in notes.items()},
        )
        write_whole(Path(path), lambda partial: partial.write_bytes(buffer.getvalue()))

    def load_embedding(self, path: str | os.PathLike) -> dict[str, np.ndarray]:
        """Sets the images of a file by `save_embedding`, without encoding them again.

        Returns:
          The notes that were kept with them.

        Raises:
          UserError: no such file, not one of ours, or made by another image encoder.
        """
        try:
            # Opened here: np.load leaves a damaged file open.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                saved = dict(archive)
            weights = str(saved["weights"])
            parts = saved["embedding"], saved["original_shape"], saved["valid_shape"]
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error):
            raise UserError(f"{path}: no file of Predictor.save_embedding; make it again") from None
        if weights != self._fingerprint():
            raise UserError(f"{path}: made with other weights; encode the image again")
        self._images = [
            EncodedImage(jnp.asarray(embedding), tuple(map(int, shape)), tuple(map(int, valid)))
            for embedding, shape, valid in zip(*parts, strict=True)
        ]
        return {k.removeprefix("note_"): v for k, v in saved.items() if k.startswith("note_")}

    def _fingerprint(self) -> str:
        """Of the encoder and of how it is fed."""
        config = self.model.config.to_dict()
        fed = {name: config[name] for name in ("encoder", "image_size", "dtype")}
        fed["preprocessing"] = self._preprocessing.fields_of_embedding()
        digest = hashlib.sha256(json.dumps(fed, sort_keys=True).encode())
        for name, array in self._functional.arrays.items():
            if name.startswith("image_encoder."):
                digest.update(np.asarray(array).tobytes())
        return digest.hexdigest()
