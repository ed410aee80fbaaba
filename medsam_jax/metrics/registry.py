"""Metrics as rows that are data, read by training's validation, evaluation and tables.

To add a metric, write its function and add one row to `METRICS`.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from medsam_jax.metrics.checks import Spacing
from medsam_jax.metrics.overlap import Mask, dice, dice_batch, iou, iou_batch
from medsam_jax.metrics.surface import (
    Directed,
    average_distance,
    distance_percentile,
    normalized_surface_dice,
    surface_distances,
)
from medsam_jax.metrics.surface_jax import nsd_batch


@dataclasses.dataclass(frozen=True)
class MaskPair:
    """A prediction and the truth, with the costly results that several metrics share."""

    pred: np.ndarray  # bool, or 0 and 1, [H, W] or [Z, Y, X]
    target: np.ndarray  # likewise, of the same shape
    spacing: Spacing  # in array order
    tolerance: float  # in the unit of the spacing

    @functools.cached_property
    def surface_distances(self) -> Directed | None:
        return surface_distances(self.pred, self.target, self.spacing)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of one object, and how it is shown. Both masks empty is NaN in every metric."""

    name: str  # column of CSV files, key of scores
    heading: str  # in printed tables and figures
    score: Callable[[MaskPair], float]
    # (pred [B, H, W], target, spacing, tolerance) -> [B]; works under jit. None: on the host only.
    batch: Callable[[Mask, Mask, Spacing, float], Float[Array, " b"]] | None = None
    is_length: bool = False  # in the unit of the spacing; otherwise a share from 0 to 1
    uses_tolerance: bool = False
    is_main: bool = False  # with its mean in tables, statistical tests and figures of its own

    def title(self, tolerance: float, unit: str) -> str:
        """Returns the heading with the tolerance or unit that the numbers depend on."""
        if self.uses_tolerance:
            return f"{self.heading} ({tolerance:g} {unit})"
        return f"{self.heading} ({unit})" if self.is_length else self.heading


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "dice",
            "DSC",
            lambda masks: dice(masks.pred, masks.target),
            lambda pred, target, *_: dice_batch(pred, target),
            is_main=True,
        ),
        Metric(
            "nsd",
            "NSD",
            lambda m: normalized_surface_dice(m.pred, m.target, m.spacing, m.tolerance),
            nsd_batch,
            uses_tolerance=True,
            is_main=True,
        ),
        Metric(
            "iou",
            "IoU",
            lambda masks: iou(masks.pred, masks.target),
            lambda pred, target, *_: iou_batch(pred, target),
        ),
        Metric(
            "hd95",
            "HD95",
            lambda masks: distance_percentile(masks.surface_distances, 95.0),
            is_length=True,
        ),
        Metric(
            "asd",
            "ASD",
            lambda masks: average_distance(masks.surface_distances),
            is_length=True,
        ),
    )
}


def mask_scores(
    pred: np.ndarray, target: np.ndarray, spacing: Spacing, tolerance: float
) -> dict[str, float]:
    """Returns every metric of one pair of masks by name; masks as `normalized_surface_dice`."""
    masks = MaskPair(pred, target, spacing, tolerance)
    return {name: metric.score(masks) for name, metric in METRICS.items()}
