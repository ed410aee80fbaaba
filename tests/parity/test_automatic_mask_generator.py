"""Automatic masks by points against `SamAutomaticMaskGenerator`: same weights, same settings.

Random weights make ragged masks that reach across the picture, so the filters are open and no box
suppresses another: every mask passes through every step and must be found again. LiteMedSAM's
masks on real slices go through suppression too.
"""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from flax import nnx

import medsam_jax
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator
from medsam_jax.inference.mask_records import point_grid
from medsam_jax.inference.predictor import Predictor
from tests.parity.matching import count_matched
from tests.parity.torch_models import (
    LiteTransform,
    lite_medsam_as_sam,
    load_torch_lite_medsam,
    smooth_picture,
    stub_torchvision,
)

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


@pytest.fixture(scope="module")
def lite_pair():
    return medsam_jax.load_model("lite_medsam"), lite_medsam_as_sam(load_torch_lite_medsam())


def test_same_masks_of_a_real_slice(lite_pair):
    """Trained on boxes only, these weights answer points with logits far below 0, so the masks are
    cut where a seventh of the pixels lies above."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "lite_medsam_brain1.npz")
    image = cv2.merge([cv2.resize(golden["image"][:200], (384, 300))] * 3)
    model, theirs = lite_pair
    predictor = Predictor(model)
    predictor.set_image(image)
    grid = point_grid(6)[:, None] * (384, 300)
    _, _, logits = predictor.predict(grid, np.ones((36, 1), int))
    theirs.mask_threshold = float(np.quantile(logits, 6 / 7))
    preprocessing = dataclasses.replace(
        model.config.preprocessing, mask_threshold=theirs.mask_threshold
    )
    ours = nnx.merge(*nnx.split(model))
    ours.config = dataclasses.replace(model.config, preprocessing=preprocessing)
    settings = {
        "points_per_side": 6,
        "points_per_batch": 16,
        "pred_iou_thresh": 0.05,
        "stability_score_thresh": 0.2,
        "stability_score_offset": 0.02,
    }
    generator = SamAutomaticMaskGenerator(theirs, **settings)
    generator.predictor.transform = LiteTransform(256)
    expected = [answer for answer in generator.generate(image) if answer["area"]]
    answers = AutomaticMaskGenerator(ours, prompts="points", **settings).generate(image)
    assert len(expected) >= 4
    assert abs(len(answers) - len(expected)) <= 0.02 * len(expected)
    assert count_matched(answers, expected, 0.95) >= 0.98 * len(expected)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()
