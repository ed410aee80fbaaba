"""Dice similarity coefficient (DSC) and intersection over union (IoU) of masks.

Empty masks: both empty is NaN (nothing to find: leave it out of a mean and count it), exactly one
empty is 0. The same holds for the normalized surface Dice.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from medsam_jax.metrics.checks import as_mask, check_shapes, is_jax

Mask = np.ndarray | jax.Array
Masks = Bool[Array, "b ..."] | Integer[Array, "b ..."]


def dice(pred: Mask, target: Mask) -> float | Float[Array, ""]:
    """Dice similarity coefficient, 2 |A and B| / (|A| + |B|), of two 2D or 3D masks.

    NumPy arrays give a Python float; jax arrays give a float32 scalar and work under `jit` and
    `vmap`.

    Raises:
      ValueError: shapes differ, or a NumPy array holds anything but 0, 1 and booleans.
    """
    check_shapes(pred, target, (1, 2, 3))
    if is_jax(pred, target):
        return dice_batch(jnp.asarray(pred)[None], jnp.asarray(target)[None])[0]
    intersection, total = _counts(pred, target)
    return 2 * intersection / total if total else float("nan")


def iou(pred: Mask, target: Mask) -> float | Float[Array, ""]:
    """Intersection over union of two 2D or 3D masks; otherwise as `dice`."""
    check_shapes(pred, target, (1, 2, 3))
    if is_jax(pred, target):
        return iou_batch(jnp.asarray(pred)[None], jnp.asarray(target)[None])[0]
    intersection, total = _counts(pred, target)
    return intersection / (total - intersection) if total else float("nan")


@jax.jit
def dice_batch(pred: Masks, target: Masks) -> Float[Array, " b"]:
    """DSC of each pair in a batch; nonzero is foreground. Both empty is NaN."""
    intersection, total = _batch_counts(pred, target)
    return 2 * intersection / total


@jax.jit
def iou_batch(pred: Masks, target: Masks) -> Float[Array, " b"]:
    """IoU of each pair in a batch; nonzero is foreground. Both empty is NaN."""
    intersection, total = _batch_counts(pred, target)
    return intersection / (total - intersection)


def _counts(pred: np.ndarray, target: np.ndarray) -> tuple[int, int]:
    pred, target = as_mask("pred", pred), as_mask("target", target)
    intersection = int(np.count_nonzero(pred & target))
    return intersection, int(np.count_nonzero(pred) + np.count_nonzero(target))


def _batch_counts(pred: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exact integer counts; the only rounding is that of the final division."""
    pred, target = pred.astype(bool), target.astype(bool)
    return _count(pred & target), _count(pred) + _count(target)


def _count(masks: Bool[Array, "b ..."]) -> Int[Array, " b"]:
    """Number of set pixels. Bytes are summed first, 128 at a time: 30 times faster on a CPU."""
    flat = masks.reshape(masks.shape[0], -1).astype(jnp.uint8)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % 128)))
    partial = flat.reshape(flat.shape[0], 128, -1).sum(axis=1, dtype=jnp.uint8)
    return partial.sum(axis=1, dtype=jnp.int32)
