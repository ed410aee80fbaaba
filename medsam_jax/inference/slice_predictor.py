"""Masks for many prompts on many slices: fixed shapes, one embedding a slice, devices kept busy."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Bool, UInt8

from medsam_jax.data.prompts import Prompt
from medsam_jax.errors import UserError
from medsam_jax.inference.engine import Engine, Shape
from medsam_jax.inference.prompts import Prompts
from medsam_jax.ops.compile import one_ahead


@dataclasses.dataclass(frozen=True)
class SliceTask:
    """A slice and the prompts to answer on it."""

    name: str  # for messages: case and slice
    image: UInt8[np.ndarray, "s s 3"]  # on the recipe's grid
    valid_shape: Shape  # the part that is not padding
    prompts: Sequence[Prompt]  # in pixels of the masks


class SlicePredictor:
    """Runs one model on slices, `batch_size` at a time, and on their prompts, as many at a time.

    Args:
      model: see `Engine`.
      batch_size: rounded up to a multiple of this process's devices.
    """

    def __init__(self, model: nnx.Module, batch_size: int):
        self.engine = Engine(model)
        self.preprocessing = self.engine.preprocessing
        devices = len(self.engine.devices)
        self.batch_size = -(-batch_size // devices) * devices

    def run(
        self, tasks: Iterable[SliceTask], original_shape: Shape | None = None
    ) -> Iterator[list[list[Bool[np.ndarray, "h w"]]]]:
        """Answers tasks in order, a batch of slices at a time, one list of masks per slice.

        Args:
          original_shape: (H, W) of the slices before they were resized: prompts and masks are in
            those pixels. Without it they are in pixels of the valid part of the stored grid.

        Raises:
          UserError: a model output that is not finite, named by the slice.
        """
        left = iter(tasks)
        chunks = iter(lambda: tuple(itertools.islice(left, self.batch_size)), ())
        for launched in one_ahead(self._launch(chunk, original_shape) for chunk in chunks):
            yield self._collect(*launched)

    def _launch(self, chunk: Sequence[SliceTask], original_shape: Shape | None) -> tuple[Any, ...]:
        """Starts the work on a batch of slices; nothing waits for the device here."""
        images = np.stack([task.image for task in chunk])
        valid_shapes = np.array([task.valid_shape for task in chunk], np.int32)
        embeddings = self.engine.embed(images, valid_shapes, self.batch_size)
        shapes = [original_shape or task.valid_shape for task in chunk]
        owners = [i for i, task in enumerate(chunk) for _ in task.prompts]
        prompts = [_as_prompts(prompt) for task in chunk for prompt in task.prompts]
        outputs = []
        for start in range(0, len(prompts), self.batch_size):
            places = range(start, start + self.batch_size)
            part = [min(place, len(prompts) - 1) for place in places]  # the last fills the batch
            logits, _ = self.engine.decode(
                embeddings[np.array([owners[i] for i in part])],
                [shapes[owners[i]] for i in part],
                [prompts[i] for i in part],
            )
            outputs.append(logits)
        return chunk, shapes, owners, outputs

    def _collect(self, chunk, shapes, owners, outputs) -> list[list[np.ndarray]]:
        """Waits for what `_launch` returned and hands the masks to their slices."""
        results: list[list[np.ndarray]] = [[] for _ in chunk]
        answers = itertools.chain.from_iterable(np.asarray(output) for output in outputs)
        for owner, logits in zip(owners, answers, strict=False):  # [P=1, C=1, m, m]
            task = chunk[owner]
            if not np.isfinite(logits).all():
                raise UserError(
                    f"{task.name}: the model's output is not finite; check the checkpoint "
                    "(a diverged training run?) and the slice"
                )
            mask = self.engine.restore(logits[0, 0], task.valid_shape, shapes[owner])
            results[owner].append(mask)
        return results


def _as_prompts(prompt: Prompt) -> Prompts:
    if prompt.box is not None:
        return Prompts(boxes=prompt.box[None])
    return Prompts(coords=prompt.points[None], labels=prompt.labels[None])
