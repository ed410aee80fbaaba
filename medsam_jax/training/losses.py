"""MedSAM's loss: soft Dice with squared denominator plus cross-entropy, per object.

MONAI's `DiceLoss(sigmoid=True, squared_pred=True)` and `BCEWithLogitsLoss`, over the pixels that
are not padding. Differences: padding does not count (MedSAM squashes and has none).
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr


def dice_loss(
    logits: Float[Array, "b h w"], target: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """1 - (2 sum(p g) + e) / (sum(p^2) + sum(g^2) + e) of each object, p the probabilities."""
    probability = jax.nn.sigmoid(logits) * valid
    truth = (target & valid).astype(logits.dtype)
    overlap = jnp.sum(probability * truth, axis=(1, 2))
    size = jnp.sum(probability**2, axis=(1, 2)) + jnp.sum(truth, axis=(1, 2))
    return 1.0 - (2.0 * overlap + SMOOTH) / (size + SMOOTH)


def cross_entropy_loss(
    logits: Float[Array, "b h w"], target: Bool[Array, "b h w"], valid: Bool[Array, "b h w"]
) -> Float[Array, " b"]:
    """Mean binary cross-entropy over the valid pixels of each object."""
    entropy = optax.sigmoid_binary_cross_entropy(logits, target.astype(logits.dtype))
    return jnp.sum(entropy * valid, axis=(1, 2)) / jnp.maximum(jnp.sum(valid, axis=(1, 2)), 1)


def valid_pixels(valid_shape: Array, size: int) -> Bool[Array, "b s s"]:
    """Which pixels of the stored slice are not padding, from [B, 2] heights and widths."""
    position = jnp.arange(size)
    rows = position < valid_shape[:, 0, None]
    columns = position < valid_shape[:, 1, None]
    return rows[:, :, None] & columns[:, None, :]
