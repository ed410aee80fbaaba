"""Dice similarity coefficient (DSC) and intersection over union (IoU) of masks.

Empty masks: both empty is NaN (nothing to find: leave it out of a mean and count it), exactly one
empty is 0. The same holds for the normalized surface Dice.

A mask is boolean, or 0 and 1 only: label maps are refused, in NumPy and in jax. Traced arrays must
be boolean, as their values are not known.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medsam_jax.metrics.checks import as_mask, check_shapes, is_jax

Mask = np.ndarray | jax.Array


def dice(pred: Mask, target: Mask) -> float | Float[Array, ""]:
    """Returns the Dice similarity coefficient, 2 |A and B| / (|A| + |B|), of 2D or 3D masks.

    NumPy arrays give a Python float; jax arrays give a float32 scalar and work under `jit` and
    `vmap`. Raises ValueError if shapes differ or an array is no mask.
    """
    check_shapes(pred, target, (1, 2, 3))
    if is_jax(pred, target):
        return dice_batch(jnp.asarray(pred)[None], jnp.asarray(target)[None])[0]
    intersection, total = _counts(pred, target)
    return 2 * intersection / total if total else float("nan")


def iou(pred: Mask, target: Mask) -> float | Float[Array, ""]:
    """Returns the intersection over union of two 2D or 3D masks; otherwise as `dice`."""
    check_shapes(pred, target, (1, 2, 3))
    if is_jax(pred, target):
        return iou_batch(jnp.asarray(pred)[None], jnp.asarray(target)[None])[0]
    intersection, total = _counts(pred, target)
    return intersection / (total - intersection) if total else float("nan")


def dice_batch(pred: Mask, target: Mask) -> Float[Array, " b"]:
    """Returns the DSC of each pair in a batch, [B, ...]; both empty is NaN."""
    return _dice_and_iou(as_mask("pred", pred), as_mask("target", target))[0]


def iou_batch(pred: Mask, target: Mask) -> Float[Array, " b"]:
    """Returns the IoU of each pair in a batch, [B, ...]; both empty is NaN."""
    return _dice_and_iou(as_mask("pred", pred), as_mask("target", target))[1]


def _counts(pred: np.ndarray, target: np.ndarray) -> tuple[int, int]:
    pred, target = as_mask("pred", pred), as_mask("target", target)
    counts = (int(np.count_nonzero(mask)) for mask in (pred & target, pred, target))
    return next(counts), sum(counts)


@jax.jit
def _dice_and_iou(
    pred: Bool[Array, "b ..."], target: Bool[Array, "b ..."]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Divides exact integer counts; only the division rounds."""
    intersection, total = _count(pred & target), _count(pred) + _count(target)
    return 2 * intersection / total, intersection / (total - intersection)


def _count(masks: Bool[Array, "b ..."]) -> Int[Array, " b"]:
    """Counts set pixels. Bytes are summed first, 128 at a time, which a CPU does in vectors."""
    flat = masks.reshape(masks.shape[0], -1).astype(jnp.uint8)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % 128)))
    partial = flat.reshape(flat.shape[0], 128, -1).sum(axis=1, dtype=jnp.uint8)
    return partial.sum(axis=1, dtype=jnp.int32)
