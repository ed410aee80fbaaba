"""Overlap and surface metrics for masks: one definition, for NumPy and for jitted jax arrays."""

from medsam_jax.metrics.labels import label_scores
from medsam_jax.metrics.overlap import dice, dice_batch, iou, iou_batch
from medsam_jax.metrics.registry import METRICS, Metric, mask_scores
from medsam_jax.metrics.surface import (
    average_surface_distance,
    hausdorff_distance,
    normalized_surface_dice,
)
from medsam_jax.metrics.surface_jax import nsd_batch

__all__ = [
    "METRICS",
    "Metric",
    "average_surface_distance",
    "dice",
    "dice_batch",
    "hausdorff_distance",
    "iou",
    "iou_batch",
    "label_scores",
    "mask_scores",
    "normalized_surface_dice",
    "nsd_batch",
]
