"""All scores of one object, and how its prediction is kept."""

import numpy as np
from jaxtyping import Bool

from medsam_jax.metrics import dice, iou, normalized_surface_dice
from medsam_jax.metrics.surface import distance_scores

# Name -> (heading with unit, whether more is better).
METRICS = {
    "dice": ("DSC", True),
    "nsd": ("NSD", True),
    "iou": ("IoU", True),
    "hd95": ("HD95", False),
    "asd": ("ASD", False),
}


def object_scores(
    prediction: Bool[np.ndarray, "..."],
    truth: Bool[np.ndarray, "..."],
    spacing: tuple[float, ...],
    tolerance: float,
) -> dict[str, float]:
    """Every metric of `METRICS` for one object, 2D or 3D, in the unit of `spacing`.

    Raises:
      ValueError: shapes differ, or bad spacing or tolerance.
    """
    hd95, asd = distance_scores(prediction, truth, spacing)
    return {
        "dice": dice(prediction, truth),
        "nsd": normalized_surface_dice(prediction, truth, spacing, tolerance),
        "iou": iou(prediction, truth),
        "hd95": hd95,
        "asd": asd,
    }


def encode_runs(mask: Bool[np.ndarray, "..."]) -> list[int]:
    """Lengths of the runs of 0 and 1 in array order, zeros first: COCO's counts, by rows."""
    flat = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])
    return np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist() if mask.size else []


def decode_runs(runs: list[int], shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Inverse of `encode_runs`."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape)
