"""Prompts drawn from masks, for training and evaluation: boxes, exact or jittered, and points.

Every draw takes its randomness from the generator that the caller hands in.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

PADDING_LABEL = -2  # beside SAM's -1 (not a point), 0 (background) and 1 (foreground)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A box, or points with labels (1 on the object, 0 beside it); pixels, xy."""

    box: Float[np.ndarray, " 4"] | None = None
    points: Float[np.ndarray, "n 2"] | None = None
    labels: Int[np.ndarray, " n"] | None = None


def box_from_mask(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "4"]:
    """Returns the box (x_min, y_min, x_max, y_max) of an object, by its extreme pixels, as MedSAM.

    Raises ValueError for an empty mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ValueError("box_from_mask: the mask is empty")
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


def jitter_box(
    box: Float[np.ndarray, "4"],
    jitter: int,
    valid_shape: Sequence[int] | Int[np.ndarray, "2"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "4"]:
    """Moves each side outwards by 0 to `jitter` pixels, uniformly, inside the valid part.

    As in MedSAM (19 of 256 in v1, 20 of 1024 in v2, 5 of 256 in LiteMedSAM), except that the
    draw comes from a seeded generator and the far sides end at the last pixel, not after it.
    """
    outwards = rng.integers(0, jitter, size=4, endpoint=True) * [-1, -1, 1, 1]
    height, width = valid_shape
    return np.clip(box + outwards, 0, [width - 1, height - 1] * 2).astype(np.float32)


def sample_points(
    mask: Bool[np.ndarray, "h w"], count: int, rng: np.random.Generator
) -> Float[np.ndarray, "n 2"]:
    """Draws `count` points (x, y) uniformly from the set pixels of a mask of any shape.

    MedSAM's trainer draws x and y independently, which misses crescents, rings and diagonals.
    Points do not repeat while there are enough pixels. Raises ValueError for an empty mask.
    """
    pixels = np.flatnonzero(mask)
    if pixels.size == 0:
        raise ValueError("sample_points: the mask is empty")
    chosen = rng.choice(pixels, size=count, replace=count > pixels.size)
    rows, columns = np.divmod(chosen, mask.shape[1])
    return np.stack([columns, rows], axis=1).astype(np.float32)


def draw_points(
    mask: Bool[np.ndarray, "h w"], on: int, beside: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Draws so many points on an object (label 1), then beside it (label 0).

    The mask is that of the valid part of a slice. Points beside one that fills it are padding.
    """
    inside = sample_points(mask, on, rng)
    if mask.all():
        outside, label = np.zeros((beside, 2), np.float32), PADDING_LABEL
    else:
        outside, label = sample_points(~mask, beside, rng), 0
    labels = np.array([1] * on + [label] * beside, np.int32)
    return np.concatenate([inside, outside]), labels


def keep_points(labels: Int[np.ndarray, " n"], on: int, beside: int) -> None:
    """Turns points into padding, in place, except the first `on` on the object and `beside` it."""
    for kind, count in ((1, on), (0, beside)):
        labels[np.flatnonzero(labels == kind)[count:]] = PADDING_LABEL
