"""Losses of one object each, and `LOSSES`, the table that `config.losses` weighs.

MedSAM's are MONAI's `DiceLoss(sigmoid=True, squared_pred=True)` and `BCEWithLogitsLoss`, over the
pixels that are not padding. Differences: padding does not count (MedSAM squashes and has none).

For points, SAM's training (Kirillov et al. 2023, appendix A): the predicted IoU learns the IoU of
the thresholded mask, and one point trains the best of three masks. Differences: see
`answer_weights`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr


def dice_loss(
    logits: Float[Array, "*#b h w"], target: Bool[Array, "*#b h w"], valid: Bool[Array, "*#b h w"]
) -> Float[Array, "*#b"]:
    """1 - (2 sum(p g) + e) / (sum(p^2) + sum(g^2) + e) of each object, p the probabilities."""
    probability = jax.nn.sigmoid(logits) * valid
    truth = (target & valid).astype(logits.dtype)
    overlap = jnp.sum(probability * truth, axis=(-2, -1))
    size = jnp.sum(probability**2, axis=(-2, -1)) + jnp.sum(truth, axis=(-2, -1))
    return 1.0 - (2.0 * overlap + SMOOTH) / (size + SMOOTH)


def cross_entropy_loss(
    logits: Float[Array, "*#b h w"], target: Bool[Array, "*#b h w"], valid: Bool[Array, "*#b h w"]
) -> Float[Array, "*#b"]:
    """Mean binary cross-entropy over the valid pixels of each object."""
    entropy = jax.nn.softplus(logits) - logits * target
    pixels = jnp.maximum(jnp.sum(valid, axis=(-2, -1)), 1)
    return jnp.sum(entropy * valid, axis=(-2, -1)) / pixels


def iou_loss(
    predicted_iou: Float[Array, "*#b"],
    prediction: Bool[Array, "*#b h w"],
    target: Bool[Array, "*#b h w"],
    valid: Bool[Array, "*#b h w"],
) -> Float[Array, "*#b"]:
    """Squared error of the predicted IoU; no gradient flows into the thresholded `prediction`."""
    prediction, truth = prediction & valid, target & valid
    intersection = jnp.sum(prediction & truth, axis=(-2, -1))
    union = jnp.sum(prediction | truth, axis=(-2, -1))
    return jnp.square(predicted_iou - intersection / jnp.maximum(union, 1))


class Loss(NamedTuple):
    """A row of `LOSSES`.

    A mask loss takes logits, target and valid pixels. A score loss trains the predicted IoU: it
    takes the predicted IoU, the thresholded masks, target and valid pixels.
    """

    function: Callable[..., Float[Array, "*b"]]
    curve: str  # logged as `train/CURVE`, before its weight
    of_score: bool = False


# To add a loss, write its function and a row here; `config.losses.NAME` is then its weight.
LOSSES = {
    "dice": Loss(dice_loss, "dice_loss"),
    "cross_entropy": Loss(cross_entropy_loss, "cross_entropy"),
    "iou": Loss(iou_loss, "iou_loss", of_score=True),
}


def answer_weights(
    losses: Float[Array, "b p m"], point_labels: Int[Array, "b p n"] | None, multimask: bool
) -> Float[Array, "b p m"]:
    """Weights of a prompt's masks in the mask losses; they sum to 1.

    A box or several points train the single mask. One point gives half its weight to the single
    mask, since an annotated data set says which object a point means, and half to the best of the
    three masks that `multimask_output=True` returns. SAM gives all the weight to the best of three.

    Args:
      losses: losses of the single mask and the three, or of the single mask alone.
      point_labels: 1 and 0, -2 for padding; None where all prompts are boxes.
      multimask: whether the three masks are trained.
    """
    single = jnp.zeros_like(losses).at[..., 0].set(1.0)
    if losses.shape[-1] == 1 or point_labels is None or not multimask:
        return single
    best = jax.nn.one_hot(1 + jnp.argmin(losses[..., 1:], axis=-1), losses.shape[-1])
    return jnp.where(is_one_point(point_labels), 0.5 * (single + best), single)


def score_weights(
    errors: Float[Array, "b p m"], point_labels: Int[Array, "b p n"] | None, multimask: bool
) -> Float[Array, "b p m"]:
    """Weights of a prompt's masks in the score losses; they sum to 1.

    One point trains the predicted IoU of all four masks equally, since users rank the three by it;
    any other prompt trains that of the single mask. Arguments as `answer_weights`.
    """
    single = jnp.zeros_like(errors).at[..., 0].set(1.0)
    if errors.shape[-1] == 1 or point_labels is None or not multimask:
        return single
    return jnp.where(is_one_point(point_labels), 1.0 / errors.shape[-1], single)


def is_one_point(point_labels: Int[Array, "b p n"]) -> Bool[Array, "b p 1"]:
    """True for prompts that are a single point."""
    return jnp.sum(point_labels >= 0, axis=-1, keepdims=True) == 1
