"""Masks for prompts on images, with the verbs of segment_anything's `SamPredictor`.

Differences: images are scans as well as pictures, prepared by the checkpoint's contract; several
images and prompts go through the model in one call; masks of several prompts keep a leading axis.
"""

import io
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from medsam_jax.data.modality import doubts
from medsam_jax.data.preprocess import normalise_intensity
from medsam_jax.errors import UserError
from medsam_jax.inference.engine import EncodedImage, Engine
from medsam_jax.inference.prompts import PARTS, Prompts, read_prompts
from medsam_jax.io.files import write_whole

log = logging.getLogger(__name__)

_PROMPTS_AT_ONCE = 64  # of one image through the decoder: 0.3 GB of upscaled embeddings

Answer = tuple[np.ndarray, np.ndarray, np.ndarray]  # masks, scores, low_res_logits


class Predictor:
    """Encodes images once and answers any number of prompts on them.

    Longer than other classes here: it has the verbs of `SamPredictor` and their documentation. The
    work is done by its `Engine`, whose compiled programs serve images of every size.

    Args:
      model: a `Sam`, or a `UNet`, which takes boxes only and predicts no IoU (scores are NaN). Or
        an engine, with a precision of its own.
      matmul_precision: of float32 products: "highest", or "high" or "default" for speed on a GPU or
        TPU, see `ops.form.MATMUL_PRECISIONS`.
    """

    def __init__(self, model: nnx.Module | Engine, matmul_precision: str = "highest"):
        self.engine = model if isinstance(model, Engine) else Engine(model, matmul_precision)
        self.model = self.engine.model
        self._images: list[EncodedImage] = []

    @classmethod
    def of(cls, model: "nnx.Module | Predictor") -> "Predictor":
        """A predictor without images; made from another, it shares that one's compiled programs."""
        return cls(model.engine if isinstance(model, Predictor) else model)

    def set_image(
        self, image: np.ndarray, modality: str | None = None, window: str | None = None
    ) -> None:
        """Encodes one image for the `predict` calls that follow.

        Args:
          image: [H, W] or [H, W, 3]; HU, scanner units or grey levels, any integer or float type.
            It goes through the checkpoint's intensity rule, which leaves uint8 as it is in all
            recipes but v1. For a slice of a volume, `normalise` the volume, whose limits are the
            scan's, and give the slice to `set_normalised`.
          modality: "CT" means HU and selects a window; anything else the recipe's percentiles.
          window: a CT window of the recipe; by default the one the checkpoint was trained on.

        Raises:
          UserError: empty, NaN or infinite, of another shape, or constant where limits are needed.
        """
        self.set_images([image], modality, window)

    def set_images(
        self, images: Sequence[np.ndarray], modality: str | None = None, window: str | None = None
    ) -> None:
        """Encodes several images of any sizes, as `set_image`; then use `predict_batch`."""
        self.set_normalised([self.normalise(image, modality, window) for image in images])

    def normalise(
        self,
        image: np.ndarray,
        modality: str | None = None,
        window: str | None = None,
        name: str = "image",
    ) -> UInt8[np.ndarray, "h w *c"]:
        """Applies the checkpoint's intensity rule, once for each image; see `set_image`.

        Logs a warning with `name` if the values may not be those of the modality.
        """
        image = np.asarray(image)
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise UserError(f"image: shape {image.shape}; give [H, W] or [H, W, 3]")
        if image.size == 0:
            raise UserError(f"image: shape {image.shape} has no pixels")
        if image.dtype.kind not in "iuf":
            raise UserError(f"image: type {image.dtype}; give integers or floats")
        if not np.isfinite(image).all():
            raise UserError("image: contains NaN or infinity; replace them (with 0, or air)")
        for doubt in doubts(image, modality, self.engine.recipe):
            log.warning("%s: %s", name, doubt)
        window = self.engine.preprocessing.ct_window(window)
        return normalise_intensity(image, modality, self.engine.recipe, window)

    def set_normalised(self, images: Sequence[np.ndarray]) -> None:
        """Encodes uint8 images that `normalise` returned, or crops and slices of them."""
        if not len(images):
            raise UserError("images: none given")
        self.use(self.engine.encode(images))

    def use(self, images: Sequence[EncodedImage]) -> None:
        """Sets images that `Engine.encode` returned, now or earlier."""
        self._images = list(images)

    @property
    def images(self) -> list[EncodedImage]:
        """The images that are set, for `use`."""
        return list(self._images)

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
        prompts = dict(zip(PARTS, (point_coords, point_labels, box, mask_input), strict=True))
        return self.predict_batch([prompts], multimask_output, return_logits)[0]

    def predict_batch(
        self,
        prompts: Sequence[Mapping[str, Any]],
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> list[Answer]:
        """Answers prompts on every image that is set: one mapping of `predict`'s arguments each.

        Kinds and numbers of prompts, and of points in them, may differ; the answers are those of
        one call for each image. Raises as `predict`, and for a key that is none of its arguments.
        """
        images = self._require_images()
        if len(prompts) != len(images):
            raise UserError(f"predict_batch: {len(prompts)} prompts for {len(images)} images")
        for index, given in enumerate(prompts):
            for name in given.keys() - PARTS:
                raise UserError(f"prompts[{index}]: unknown key {name!r}; use {', '.join(PARTS)}")
        read = [
            read_prompts(image.original_shape, self.engine.mask_side, **given)
            for image, given in zip(images, prompts, strict=True)
        ]
        answers = []
        for index, (logits, scores) in enumerate(self._decode(images, read, multimask_output)):
            if read[index].single:
                logits, scores = logits[0], scores[0]
            answers.append((self.restore(logits, return_logits, index), scores, logits))
        return answers

    def restore(
        self,
        low_res_logits: Float[np.ndarray, "... m m"],
        return_logits: bool = False,
        index: int = 0,
    ) -> np.ndarray:
        """Masks [..., H, W] of low-resolution logits, on the pixels of the `index`-th image set."""
        _, original_shape, valid_shape = self._require_images()[index]
        return self.engine.restore(low_res_logits, valid_shape, original_shape, return_logits)

    def _decode(
        self, images: Sequence[EncodedImage], prompts: Sequence[Prompts], multimask_output: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Low-resolution logits [P, C, m, m] and scores [P, C] of each image."""
        most = max(p.count for p in prompts)
        if len(images) > 1 and most * len(images) > _PROMPTS_AT_ONCE:
            return [
                self._decode([image], [p], multimask_output)[0]
                for image, p in zip(images, prompts, strict=True)
            ]
        embeddings, shapes, _ = zip(*images, strict=True)
        embeddings, parts = jnp.stack(embeddings), []
        for start in range(0, most, _PROMPTS_AT_ONCE):
            chunk = [p.part(slice(start, start + _PROMPTS_AT_ONCE)) for p in prompts]
            answer = self.engine.decode(embeddings, shapes, chunk, multimask_output)
            parts.append(jax.device_get(answer))
        logits, scores = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return [(logits[i, : p.count], scores[i, : p.count]) for i, p in enumerate(prompts)]

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
        """Writes the images that are set, and arrays as notes, to an `.npz` for `load_embedding`.

        Raises UserError where no image is set or the file cannot be written.
        """
        embeddings, original_shapes, valid_shapes = zip(*self._require_images(), strict=True)
        buffer = io.BytesIO()
        np.savez(  # not compressed: floats hardly shrink, and it takes longer than encoding
            buffer,
            embedding=np.asarray(jnp.stack(embeddings), np.float32),
            original_shape=original_shapes,
            valid_shape=valid_shapes,
            weights=self.engine.fingerprint(),
            **{f"note_{name}": value for name, value in notes.items()},
        )
        write_whole(Path(path), lambda partial: partial.write_bytes(buffer.getvalue()))

    def load_embedding(self, path: str | os.PathLike) -> dict[str, np.ndarray]:
        """Sets the images of a file by `save_embedding` without encoding them; returns its notes.

        Raises UserError for a file that is not one of ours, or made by another image encoder.
        """
        try:
            # Opened here: np.load leaves a damaged file open.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                saved = dict(archive)
            weights = str(saved["weights"])
            parts = saved["embedding"], saved["original_shape"], saved["valid_shape"]
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error):
            raise UserError(f"{path}: no file of Predictor.save_embedding; make it again") from None
        if weights != self.engine.fingerprint():
            raise UserError(f"{path}: made with other weights; encode the image again")
        self._images = [
            EncodedImage(jnp.asarray(embedding), tuple(map(int, shape)), tuple(map(int, valid)))
            for embedding, shape, valid in zip(*parts, strict=True)
        ]
        return {k.removeprefix("note_"): v for k, v in saved.items() if k.startswith("note_")}
