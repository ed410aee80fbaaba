"""Masks for many prompts on many slices: fixed shapes, one embedding a slice, all local devices."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, UInt8

from medsam_jax.data.preprocess import encoder_input, restore_masks
from medsam_jax.data.recipes import get_recipe
from medsam_jax.errors import UserError
from medsam_jax.evaluation.protocol import Prompt
from medsam_jax.models.functional import Functional
from medsam_jax.ops.compile import jit

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class SliceTask:
    """A slice and the prompts to answer on it."""

    name: str  # for messages: case and slice
    image: UInt8[np.ndarray, "s s 3"]  # on the recipe's grid
    valid_shape: Shape  # what is not padding
    prompts: Sequence[Prompt]  # in pixels of the encoder input


class SlicePredictor:
    """Runs one model, a `Sam` or anything with its `image_encoder` and `decode`.

    Slices go through the encoder `batch_size` at a time and their prompts through the decoder as
    many at a time, each split over this process's devices.
    """

    def __init__(self, model: nnx.Module, batch_size: int):
        devices = jax.local_devices()
        self.preprocessing = model.config.preprocessing
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self._functional = Functional(model)
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._arrays = jax.device_put(self._functional.arrays, everywhere)
        self._embed = jit(self._embed_fn)
        self._decode = jax.jit(self._decode_fn, static_argnames="on_stored_grid")

    def run(
        self, tasks: Iterable[SliceTask], original_shape: Shape | None = None
    ) -> Iterator[list[list[Bool[np.ndarray, "h w"]]]]:
        """Answers tasks in order, a batch of slices at a time, one list of masks per slice.

        Args:
          original_shape: (H, W) of the slices before they were resized: masks are then of that
            size. Without it they are on the valid part of the stored grid.

        Raises:
          UserError: a model output that is not finite, named by the slice.
        """
        launched = None
        for chunk in _batched(tasks, self.batch_size):
            following = self._launch(chunk, original_shape)
            if launched is not None:
                yield self._collect(*launched)
            launched = following
        if launched is not None:
            yield self._collect(*launched)

    def _launch(self, chunk: Sequence[SliceTask], original_shape: Shape | None) -> tuple[Any, ...]:
        """Starts the work on a batch of slices; nothing waits for the device here."""
        filled = [*chunk, *[chunk[-1]] * (self.batch_size - len(chunk))]
        images = np.stack([task.image for task in filled])
        shapes = np.array([task.valid_shape for task in filled], np.int32)
        put = partial(jax.device_put, device=self._split)
        embeddings = self._embed(self._arrays, put(images), put(shapes))
        owner = [i for i, task in enumerate(chunk) for _ in task.prompts]
        prompts = [prompt for task in chunk for prompt in task.prompts]
        outputs = []
        for start in range(0, len(prompts), self.batch_size):
            part, owners = prompts[start : start + self.batch_size], owner[start:]
            missing = self.batch_size - len(part)
            index = np.array(owners[: len(part)] + [0] * missing, np.int32)
            arrays = _stack([*part, *[part[-1]] * missing])
            outputs.append(
                self._decode(
                    self._arrays,
                    embeddings,
                    put(index),
                    jax.tree.map(put, arrays),
                    on_stored_grid=original_shape is None,
                )
            )
        return chunk, owner, outputs, original_shape

    def _collect(
        self, chunk: Sequence[SliceTask], owner: list[int], outputs: list[Any], original: Any
    ) -> list[list[np.ndarray]]:
        """Waits for a batch and hands its masks to their slices."""
        results: list[list[np.ndarray]] = [[] for _ in chunk]
        maps = [one for output in outputs for one in np.asarray(output[0])]
        finite = [ok for output in outputs for ok in np.asarray(output[1])]
        for slot, one, ok in zip(owner, maps, finite, strict=False):
            task = chunk[slot]
            if not ok:
                raise UserError(
                    f"{task.name}: the model's output is not finite; check the checkpoint "
                    "(a diverged training run?) and the slice"
                )
            if original is None:
                height, width = task.valid_shape
                results[slot].append(one[:height, :width])
            else:  # on the host: sizes differ from scan to scan, and each would be compiled
                mask = restore_masks(one, task.valid_shape, original, self.preprocessing)
                results[slot].append(mask)
        return results

    def _embed_fn(self, arrays, images, valid_shape):
        pixels = encoder_input(images, valid_shape, self.preprocessing)
        return self._functional.bind(arrays).image_encoder(pixels)

    def _decode_fn(
        self, arrays, embeddings, index, prompts, on_stored_grid
    ) -> tuple[Array, Bool[Array, " b"]]:
        """Masks on the stored grid, or the low-resolution logits; and which are finite."""
        model = self._functional.bind(arrays)
        logits, _ = model.decode(embeddings[index], **prompts)
        logits = logits[:, 0, 0]  # [D, h, w]
        finite = jnp.isfinite(logits).all(axis=(1, 2))
        if not on_stored_grid:
            return logits, finite
        grid = (get_recipe(self.preprocessing.recipe).size,) * 2
        return restore_masks(logits, grid, grid, self.preprocessing), finite


def _stack(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Arguments of `Sam.decode`: one prompt for each gathered embedding."""
    if prompts[0].box is not None:
        return {"boxes": np.stack([prompt.box for prompt in prompts])[:, None]}
    points = np.stack([prompt.points for prompt in prompts])[:, None]
    return {"points": (points, np.stack([prompt.labels for prompt in prompts])[:, None])}


def _batched(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """`itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
