"""Predictor against `SamPredictor` of segment_anything: the same random weights and prompts."""

import numpy as np
import pytest

from medsam_jax.inference.predictor import Predictor
from tests.parity.torch_models import smooth_picture, stub_torchvision

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
    ours, theirs = predictors
    image = smooth_picture(*size)
    ours.set_image(image)
    theirs.set_image(image)
    for kind, prompt in prompts_for(*size).items():
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
