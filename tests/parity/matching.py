"""Counts the one-to-one matches between two sets of masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def iou_matrix(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> np.ndarray:
    """IoU [N, M] of the answers of two automatic mask generators; empty masks overlap nothing."""
    a, b = (
        np.array([answer["segmentation"].ravel() for answer in answers], np.float32)
        for answers in (ours, theirs)
    )
    overlap = a @ b.T
    union = a.sum(axis=1)[:, None] + b.sum(axis=1) - overlap
    return overlap / np.maximum(union, 1)


def count_matched(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], least_iou: float
) -> int:
    """The most pairs of masks, each in one pair, that overlap by `least_iou` or more."""
    from scipy.optimize import linear_sum_assignment

    if not ours or not theirs:
        return 0
    close = iou_matrix(ours, theirs) >= least_iou
    return int(close[linear_sum_assignment(close, maximize=True)].sum())
