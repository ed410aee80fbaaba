"""Predictor against `SamPredictor` of segment_anything: the same weights and prompts."""

from pathlib import Path

import cv2
import numpy as np
import pytest

import medsam_jax
from medsam_jax.inference.predictor import Predictor
from tests.parity.torch_models import (
    LiteTransform,
    lite_medsam_as_sam,
    load_torch_lite_medsam,
    smooth_picture,
    stub_torchvision,
)

with stub_torchvision():
    from segment_anything import SamPredictor

SIZES = [(1024, 1024), (300, 500), (640, 201)]  # as is; wide and enlarged; tall and odd


@pytest.fixture(scope="module")
def predictors(torch_sam, jax_sam):
    return Predictor(jax_sam), SamPredictor(torch_sam)


def prompts_for(height, width) -> dict[str, dict]:
    points = {
        "point_coords": np.array([[0.3, 0.4], [0.6, 0.7], [0.1, 0.9]]) * (width, height),
        "point_labels": np.array([1, 0, 1]),
    }
    point = {name: value[:1] for name, value in points.items()}
    box = {"box": np.array([0.2, 0.25, 0.7, 0.8]) * (width, height, width, height)}
    logits = np.random.default_rng(0).normal(0, 4, (1, 256, 256)).astype(np.float32)
    mask = {"mask_input": logits}
    return {
        "point": point,
        "points": points,
        "box": box,
        "box_points": box | points,
        "mask": mask,
        "mask_box": mask | box,
    }


@pytest.mark.parametrize("size", SIZES)
def test_same_masks_and_scores(predictors, size):
    assert_same_answers(*predictors, smooth_picture(*size))


@pytest.fixture(scope="module")
def lite_predictors():
    theirs = SamPredictor(lite_medsam_as_sam(load_torch_lite_medsam()))
    theirs.transform = LiteTransform(256)
    return Predictor(medsam_jax.load_model("lite_medsam")), theirs


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (190, 417), (1000, 333)])
def test_same_with_released_weights(lite_predictors, size):
    """On a real slice, stretched to several sizes and aspect ratios."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "lite_medsam_lung2.npz")
    image = cv2.resize(golden["image"], size[::-1], interpolation=cv2.INTER_CUBIC)
    assert_same_answers(*lite_predictors, cv2.merge([image] * 3))


def assert_same_answers(ours: Predictor, theirs: SamPredictor, image: np.ndarray) -> None:
    ours.set_image(image)
    theirs.set_image(image)
    for kind, prompt in prompts_for(*image.shape[:2]).items():
        for multimask in (False, True):
            masks, scores, logits = ours.predict(**prompt, multimask_output=multimask)
            expected = theirs.predict(**prompt, multimask_output=multimask)
            where = f"{kind}, multimask {multimask}"
            bound = 1e-4 * np.abs(expected[2]).max()
            np.testing.assert_allclose(logits, expected[2], atol=bound, rtol=0, err_msg=where)
            np.testing.assert_allclose(scores, expected[1], atol=1e-4, err_msg=where)
            for mask, other in zip(masks, expected[0], strict=True):
                union = (mask | other).sum()
                assert (mask & other).sum() >= 0.999 * union, where
