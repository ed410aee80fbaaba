"""Runs a model: images to embeddings, prompts to logits, logits to masks on the image's pixels.

`Predictor`, `AutomaticMaskGenerator`, `VolumePredictor`, the evaluation and the embedding pass all
use this one engine, so the same image and prompt give the same mask by every door.

Images are encoded on all local devices, each of which takes its share of a batch. Prompts of many
images are decoded the same way; prompts of a single image stay on the first device.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from medsam_jax.data.preprocess import prompts_to_input, resize_image, restore_masks
from medsam_jax.data.recipes import get_recipe
from medsam_jax.errors import UserError
from medsam_jax.inference.prompts import Prompts, pack
from medsam_jax.io.files import keep_compiled_programs
from medsam_jax.models.functional import Functional
from medsam_jax.models.unet import UNet
from medsam_jax.ops.compile import jit
from medsam_jax.ops.form import local_form

Shape = tuple[int, int]

_IMAGES_AT_ONCE = 8  # on each device


class EncodedImage(NamedTuple):
    """An image as the decoder takes it."""

    embedding: Float[Array, "h w c"]
    original_shape: Shape  # (H, W), pixels of the image
    valid_shape: Shape  # (h, w), the part of the stored grid that is not padding


def embed_arrays(functional: Functional, arrays, images, valid_shape) -> Array:
    """Encodes slices on the recipe's grid: the program of `Engine.embed` on one device."""
    return functional.bind(arrays).encode(images, valid_shape)


def decode_arrays(
    functional: Functional, arrays, embeddings, prompts, multimask_output
) -> tuple[Array, Array]:
    """Decodes the prompts of `pack`: the program of `Engine.decode` on one device."""
    model = functional.bind(arrays)
    return model.decode(embeddings, multimask_output=multimask_output, **prompts)


class Engine:
    """A model's compiled programs, with the way into and out of them.

    Compiled shapes depend on the model, the number of images (a power of two on each device) and
    the kinds and numbers of prompts, never on the size of an image. Longer than other classes here:
    both ways, encode and decode to restore, share the arrays and their placement on the devices.

    Args:
      model: a `Sam`, a `UNet`, or another module with their `encode`, `decode` and `config`.
      matmul_precision: of float32 products, see `ops.form.MATMUL_PRECISIONS`.
    """

    def __init__(self, model: nnx.Module, matmul_precision: str = "highest"):
        keep_compiled_programs()
        self.model = model
        self.preprocessing = model.config.preprocessing
        self.recipe = get_recipe(self.preprocessing.recipe)
        self.devices = jax.local_devices()
        # On several devices, each runs the program of one on its share.
        self.form = local_form(matmul_precision=matmul_precision)
        self._functional = Functional(model, self.form)
        inference = self._functional.for_inference()
        axis = (AxisType.Auto,)
        mesh = jax.make_mesh((len(self.devices),), ("data",), axis, devices=self.devices)
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._arrays = jax.device_put(inference.arrays, everywhere)
        # The same buffers, as arrays of the first device alone.
        self._arrays_of_first = {name: x.addressable_data(0) for name, x in self._arrays.items()}
        embed = functools.partial(embed_arrays, inference)
        self._embed = jit(self._on_each_device(embed), self.form)
        self._decode_arrays = functools.partial(decode_arrays, inference)
        self._decode = jit(self._decode_arrays, self.form, static_argnums=3)
        self._decode_split = jit(self._decode_arrays_split, self.form, static_argnums=3)

    @functools.cached_property
    def mask_side(self) -> int:
        """Side of the low-resolution masks, pixels."""
        config = self.model.config
        return config.image_size if isinstance(self.model, UNet) else 4 * config.embedding_size

    def encode(self, images: Sequence[np.ndarray]) -> list[EncodedImage]:
        """Encodes uint8 images of any sizes, [H, W] or [H, W, 3], after the intensity rule.

        Raises UserError for another type, to which that rule was not applied.
        """
        for image in images:
            if image.dtype != np.uint8:
                raise UserError(
                    f"image: type {image.dtype}; give the uint8 image of Predictor.normalise"
                )
        resized = [resize_image(image, self.recipe) for image in images]
        stored, valid_shapes = zip(*resized, strict=True)
        embeddings: list[Array] = []
        while len(embeddings) < len(stored):
            start, count = len(embeddings), len(self.devices)
            left = max((len(stored) - start) // count, 1)
            size = count * min(_IMAGES_AT_ONCE, 1 << (left.bit_length() - 1))
            part = slice(start, start + size)
            shapes = np.array(valid_shapes[part], np.int32)
            batch = self.embed(np.stack(stored[part]), shapes, size)
            embeddings.extend(jax.device_put(batch, self.devices[0])[: len(shapes)])
        return [*map(EncodedImage, embeddings, (x.shape[:2] for x in images), valid_shapes)]

    def embed(
        self,
        stored: UInt8[np.ndarray, "b s s 3"],
        valid_shapes: Int[np.ndarray, "b 2"],
        size: int | None = None,
    ) -> Float[Array, "b2 h w c"]:
        """Encodes slices on the recipe's grid, every device its share; does not wait for them.

        The batch is compiled for `size`, B or more, rounded up to a multiple of the devices, and
        filled with the last slice.
        """
        count = len(stored)
        size = -(-(size or count) // len(self.devices)) * len(self.devices)
        if size > count:
            fill = [*range(count), *[count - 1] * (size - count)]
            stored, valid_shapes = stored[fill], valid_shapes[fill]
        return self._embed(self._arrays, *jax.device_put((stored, valid_shapes), self._split))

    def decode(
        self,
        embeddings: Float[Array | np.ndarray, "b h w c"],
        original_shapes: Sequence[Shape],
        prompts: Sequence[Prompts],
        multimask_output: bool = False,
        count: int | None = None,
    ) -> tuple[Float[Array, "b p k m m"], Float[Array, "b p k"]]:
        """Low-resolution logits and predicted IoU for prompts on B images; does not wait for them.

        Args:
          original_shapes: (H, W) of each image.
          prompts: those of each image, in its own pixels.
          multimask_output: three masks for each prompt, or one; a U-Net always gives one.
          count: prompts to pad to, by default the next power of two. Padding has no meaning.

        Raises:
          UserError: a kind of prompt that the model cannot take.
        """
        moved = [self._to_input(*pair) for pair in zip(prompts, original_shapes, strict=True)]
        packed = pack(moved, count)
        if len(self.devices) > 1 and len(embeddings) % len(self.devices) == 0:
            batch = jax.device_put((embeddings, packed), self._split)
            return self._decode_split(self._arrays, *batch, multimask_output)
        return self._decode(self._arrays_of_first, embeddings, packed, multimask_output)

    def restore(
        self,
        low_res_logits: Float[np.ndarray, "*n m m"],
        valid_shape: Shape,
        original_shape: Shape,
        return_logits: bool = False,
    ) -> np.ndarray:
        """Masks [..., H, W] (or float32 logits) on the pixels of one image, made on the host."""
        maps = low_res_logits.reshape(-1, *low_res_logits.shape[-2:])
        masks = np.empty((len(maps), *original_shape), np.float32 if return_logits else bool)
        for mask, logits in zip(masks, maps, strict=True):  # one at a time: float maps are large
            mask[:] = restore_masks(
                logits, valid_shape, original_shape, self.preprocessing, return_logits
            )
        return masks.reshape(*low_res_logits.shape[:-2], *original_shape)

    def fingerprint(self) -> str:
        """Digest of the image encoder's weights and of everything its input depends on."""
        config = self.model.config.to_dict()
        fed = {name: config[name] for name in ("encoder", "image_size", "dtype") if name in config}
        fed["preprocessing"] = self.preprocessing.fields_of_embedding()
        digest = hashlib.sha256(json.dumps(fed, sort_keys=True).encode())
        for name, array in self._functional.arrays.items():
            if name.startswith("image_encoder."):
                digest.update(np.asarray(array).tobytes())
        return digest.hexdigest()

    def _to_input(self, prompts: Prompts, original_shape: Shape) -> Prompts:
        """Prompts in pixels of the encoder input."""
        coords, boxes = (
            x if x is None else prompts_to_input(x, original_shape, self.preprocessing)
            for x in (prompts.coords, prompts.boxes)
        )
        return prompts._replace(coords=coords, boxes=boxes)

    def _decode_arrays_split(self, arrays, embeddings, prompts, multimask_output):
        decode = functools.partial(self._decode_arrays, multimask_output=multimask_output)
        return self._on_each_device(decode)(arrays, embeddings, prompts)

    def _on_each_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(arrays, x, y)`, run by every device on its share of the batch x and y."""
        if len(self.devices) == 1:
            return function
        mesh, share = self._split.mesh, self._split.spec
        specs = PartitionSpec(), share, share
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=share, check_vma=False)
