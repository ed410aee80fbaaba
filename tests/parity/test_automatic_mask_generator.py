"""Automatic masks by points against `SamAutomaticMaskGenerator`: same weights, same settings.

Random weights make ragged masks that reach across the picture, so the filters are open and no box
suppresses another: every mask passes through every step and must be found again.
"""

import numpy as np
import pytest

from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator
from tests.parity.torch_models import smooth_picture, stub_torchvision

with stub_torchvision():
    from segment_anything import SamAutomaticMaskGenerator


@pytest.mark.parametrize(("crop_n_layers", "min_mask_region_area"), [(0, 0), (1, 30)])
def test_same_masks(torch_sam, jax_sam, crop_n_layers, min_mask_region_area):
    settings = {
        "points_per_side": 4,
        "points_per_batch": 12,
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
        "box_nms_thresh": 1.0,
        "crop_nms_thresh": 1.0,
        "crop_n_layers": crop_n_layers,
        "crop_n_points_downscale_factor": 2,
        "min_mask_region_area": min_mask_region_area,
    }
    image = smooth_picture(180, 260)
    theirs = SamAutomaticMaskGenerator(torch_sam, **settings).generate(image)
    ours = AutomaticMaskGenerator(jax_sam, **settings).generate(image)
    assert len(theirs) >= 4
    assert abs(len(ours) - len(theirs)) <= 0.02 * len(theirs)
    unmatched = list(ours)
    for expected in theirs:
        overlaps = [iou(expected["segmentation"], mask["segmentation"]) for mask in unmatched]
        assert max(overlaps, default=0) >= 0.95
        match = unmatched.pop(int(np.argmax(overlaps)))
        assert match["crop_box"] == expected["crop_box"]
        assert match["predicted_iou"] == pytest.approx(expected["predicted_iou"], abs=1e-3)
        assert match["stability_score"] == pytest.approx(expected["stability_score"], abs=1e-2)
        np.testing.assert_allclose(match["bbox"], expected["bbox"], atol=2)
        np.testing.assert_allclose(match["point_coords"], expected["point_coords"], atol=1e-6)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()
