"""Sizes and diameters of the objects in a label map."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from medsam_jax.inference.coco import annotate
from medsam_jax.metrics import lesion_size


def measure(
    labels: Int[np.ndarray, "z h w"], records: list[dict[str, Any]], spacing: Sequence[float]
) -> None:
    """Adds to the record of each object its size, its diameters and, in a picture, COCO's fields.

    Args:
      records: each with its `label`.
      spacing: mm between slices, rows and columns; NaN where unknown, then lengths are in pixels.
    """
    from scipy import ndimage

    is_known = bool(np.isfinite(spacing[1:]).all())
    unit, sides = ("mm", spacing[1:]) if is_known else ("px", (1.0, 1.0))
    extents = ndimage.find_objects(labels)
    for record in records:
        label = record["label"]
        extent = extents[label - 1] if label <= len(extents) else None
        mask = labels[extent] == label if extent else np.zeros((1, 1, 1), bool)
        size = int(np.count_nonzero(mask))
        if len(labels) == 1:
            record["area_px"] = size
            if is_known:
                record["area_mm2"] = size * float(np.prod(sides))
            record |= annotate(labels[0] == label)
        else:
            record |= {"voxels": size, "volume_ml": size * float(np.prod(spacing)) / 1000}
        measured = lesion_size.measure(mask, (1.0, *sides))
        for name in ("longest", "perpendicular"):
            record[f"{name}_{unit}"] = measured[f"{name}_mm"]
