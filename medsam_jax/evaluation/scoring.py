"""Names and headings of the scores, and how a prediction is kept."""

import numpy as np
from jaxtyping import Bool

# Of `metrics.mask_scores`: name -> (heading, whether more is better).
METRICS = {
    "dice": ("DSC", True),
    "nsd": ("NSD", True),
    "iou": ("IoU", True),
    "hd95": ("HD95", False),
    "asd": ("ASD", False),
}


def encode_runs(mask: Bool[np.ndarray, "..."]) -> list[int]:
    """Lengths of the runs of 0 and 1 in array order, zeros first: COCO's counts, by rows."""
    flat = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])
    return np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist() if mask.size else []


def decode_runs(runs: list[int], shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Inverse of `encode_runs`."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape)
