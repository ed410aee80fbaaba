"""Prompts from masks: exact and jittered boxes, and points that lie on the object."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


def box_from_mask(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "4"]:
    """The box (x_min, y_min, x_max, y_max) of an object: indices of its extreme pixels, as MedSAM.

    Raises:
      ValueError: no pixel is set.
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
    draw comes from a seeded generator and the far sides end at the last pixel, not behind it.
    """
    left, top, right, bottom = rng.integers(0, jitter, size=4, endpoint=True)
    height, width = int(valid_shape[0]), int(valid_shape[1])
    return np.array(
        [
            max(box[0] - left, 0),
            max(box[1] - top, 0),
            min(box[2] + right, width - 1),
            min(box[3] + bottom, height - 1),
        ],
        np.float32,
    )


def sample_points(
    mask: Bool[np.ndarray, "h w"], count: int, rng: np.random.Generator
) -> Float[np.ndarray, "n 2"]:
    """`count` points (x, y) drawn uniformly from the set pixels of a mask, whatever its shape.

    MedSAM's trainer draws x and y independently, which misses crescents, rings and diagonals.
    Without replacement while there are pixels enough. Raises ValueError for an empty mask.
    """
    pixels = np.flatnonzero(mask)
    if pixels.size == 0:
        raise ValueError("sample_points: the mask is empty")
    chosen = rng.choice(pixels, size=count, replace=count > pixels.size)
    rows, columns = np.divmod(chosen, mask.shape[1])
    return np.stack([columns, rows], axis=1).astype(np.float32)
