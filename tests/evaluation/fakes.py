"""A model whose answer is known, and a data set in memory, for tests of the evaluation."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from medsam_jax.data.preprocess import encoder_input
from medsam_jax.data.recipes import PREPROCESSING

SIZE = 256


class BrightInBox(nnx.Module):
    """Segments, inside the box or at a point, what is brighter than its one parameter."""

    def __init__(self, threshold: float, recipe: str = "lite"):
        preprocessing = dataclasses.replace(PREPROCESSING[recipe], normalisation="unit")
        self.config = SimpleNamespace(preprocessing=preprocessing)
        self.threshold = nnx.Param(jnp.asarray(threshold))

    def encode(self, images, valid_shape):
        return encoder_input(images, valid_shape, self.config.preprocessing)[..., :1]

    def decode(self, embeddings, boxes=None, points=None, multimask_output=False):
        logits = embeddings[..., 0] - self.threshold[...]
        if boxes is not None:
            rows = jnp.arange(SIZE)[None, :, None]
            columns = jnp.arange(SIZE)[None, None, :]
            x0, y0, x1, y1 = jnp.moveaxis(boxes[:, 0, :, None, None], 1, 0)
            inside = (rows >= y0) & (rows <= y1) & (columns >= x0) & (columns <= x1)
            logits = jnp.where(inside, logits, -1.0)
        return logits[:, None, None], jnp.full((len(logits), 1, 1), jnp.nan)


def disc(radius: float, row: float, column: float) -> np.ndarray:
    rows, columns = np.ogrid[:SIZE, :SIZE]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def record(case: str, number: int, labels: np.ndarray, bright: np.ndarray, **fields) -> dict:
    """A record as `open_dataset` gives it; `bright` [S, S] in 0 to 255."""
    return {
        "image": np.repeat(bright.astype(np.uint8)[..., None], 3, axis=2),
        "mask": labels.astype(np.uint8)[..., None],
        "case_id": case.encode(),
        "task": b"discs",
        "modality": b"CT",
        "slice_index": number,
        "spacing": np.array([1.0, 1.0], np.float32),
        "original_shape": np.array([SIZE, SIZE], np.int32),
        "valid_shape": np.array([SIZE, SIZE], np.int32),
        **fields,
    }


def discs() -> list[dict]:
    """Five slices of three cases; the bright disc is the truth, or larger than it by some pixels.

    Slice 1 has two objects, slice 2 is padded, and in slice 4 nothing is bright.
    """
    one, two = disc(20, 60, 60), disc(12, 150, 180)
    records = [
        record("a", 0, one, 200 * one),
        record("a", 1, one + 2 * two, 200 * (disc(18, 60, 60) | disc(12, 152, 180))),
        record("b", 0, one, 200 * disc(22, 60, 60), valid_shape=np.array([256, 100], np.int32)),
        record("b", 1, two, 100 * two, modality=b"MR"),
        record("c", 0, two, 0 * two, modality=b"MR"),
    ]
    return records


def fake_dataset(records: list[dict], directory: Path, recipe: str = "lite"):
    """Returns the result of `open_dataset` for these records."""
    pairs = [
        (position, label)
        for position, one in enumerate(records)
        for label in np.unique(one["mask"])[1:]
    ]
    positions, labels = np.array(pairs).T
    info = SimpleNamespace(
        directory=directory,
        recipe=recipe,
        record={"cases": [f"{len(records)} records"]},
        objects=lambda split, task: (positions, labels),
        ct_windows=lambda split: ("wide",),
    )
    return records, info
