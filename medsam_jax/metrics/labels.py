"""All metrics of every label of a label map, by explicit ids."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from medsam_jax.metrics.checks import check_shapes
from medsam_jax.metrics.overlap import dice, iou
from medsam_jax.metrics.surface import distance_scores, normalized_surface_dice


def mask_scores(
    pred: np.ndarray, target: np.ndarray, spacing: Sequence[float] | np.ndarray, tolerance: float
) -> dict[str, float]:
    """`dice`, `nsd`, `iou`, `hd95` and `asd` of one pair of masks, 2D or 3D.

    Raises:
      ValueError: as `normalized_surface_dice`.
    """
    hd95, asd = distance_scores(pred, target, spacing)
    return {
        "dice": dice(pred, target),
        "nsd": normalized_surface_dice(pred, target, spacing, tolerance),
        "iou": iou(pred, target),
        "hd95": hd95,
        "asd": asd,
    }


def label_scores(
    pred: Int[np.ndarray, "..."],
    target: Int[np.ndarray, "..."],
    labels: Sequence[int],
    spacing: Sequence[float] | np.ndarray,
    tolerance: float,
) -> dict[int, dict[str, float]]:
    """`mask_scores` of each label of two label maps; other labels are background.

    Labels are given, not found: one that only the prediction has is then a choice, not a surprise.

    Raises:
      ValueError: no or repeated labels, one that is absent from `target`, label maps that are not
        of integers; otherwise as `normalized_surface_dice`.
    """
    check_shapes(pred, target, (2, 3))
    for name, array in (("pred", pred), ("target", target)):
        if not np.issubdtype(np.asarray(array).dtype, np.integer):
            raise ValueError(f"{name} is of {np.asarray(array).dtype}; a label map has integers")
    if not len(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"labels are {list(labels)}; give each label once, and at least one")
    present = np.unique(target)
    absent = sorted(set(labels) - set(present.tolist()))
    if absent:
        raise ValueError(f"labels {absent} are not in target, which has {present.tolist()}")
    return {
        int(label): mask_scores(pred == label, target == label, spacing, tolerance)
        for label in labels
    }
