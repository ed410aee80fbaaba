"""Scores of several labels of two label maps."""

from collections.abc import Sequence

import numpy as np

from medsam_jax.metrics.checks import Spacing, check_shapes
from medsam_jax.metrics.registry import mask_scores


def label_scores(
    pred: np.ndarray, target: np.ndarray, labels: Sequence[int], spacing: Spacing, tolerance: float
) -> dict[int, dict[str, float]]:
    """Returns `mask_scores` of each label of two label maps; other labels are background.

    Raises ValueError for no or repeated labels, one that is absent from `target`, or label maps
    that are not of integers, and as `normalized_surface_dice` does.
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
