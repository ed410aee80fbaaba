"""Predictor against `SamPredictor` of segment_anything: the same random weights and prompts.

The encoder is small; prompt encoder, mask decoder, input size and all the handling are SAM's own.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from flax import nnx

from medsam_jax.inference.predictor import Predictor
from medsam_jax.models.common import update_state
from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import Sam, SamConfig
from tests.parity.torch_models import flax_variables, randomise, stub_torchvision

with stub_torchvision():
    from segment_anything import SamPredictor, modeling

ENCODER = ViTConfig(32, 2, 2, (1,))
SIZES = [(1024, 1024), (300, 500), (640, 201)]  # as is; wide and enlarged; tall and odd


@pytest.fixture(scope="module")
def torch_sam():
    torch.manual_seed(0)
    encoder = modeling.ImageEncoderViT(
        img_size=1024,
        embed_dim=ENCODER.embed_dim,
        depth=ENCODER.depth,
        num_heads=ENCODER.num_heads,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=ENCODER.window_size,
        global_attn_indexes=ENCODER.global_attn_indexes,
    )
    prompt_encoder = modeling.PromptEncoder(
        embed_dim=256,
        image_embedding_size=(64, 64),
        input_image_size=(1024, 1024),
        mask_in_chans=16,
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    mask_decoder = modeling.MaskDecoder(
        num_multimask_outputs=3,
        transformer=transformer,
        transformer_dim=256,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    sam = modeling.Sam(encoder, prompt_encoder, mask_decoder)
    randomise(sam, seed=1)
    return sam.eval()


@pytest.fixture(scope="module")
def predictors(torch_sam):
    config = dataclasses.replace(SamConfig.vit_b(), encoder=ENCODER)
    model = nnx.eval_shape(lambda: Sam(config, rngs=nnx.Rngs(0)))
    update_state(model, flax_variables(torch_sam.state_dict()))
    return Predictor(model), SamPredictor(torch_sam)


def picture(height, width):
    """Smooth and coloured, as pictures are."""
    rng = np.random.default_rng(height)
    coarse = rng.uniform(0, 255, (1, 3, 9, 11)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), (height, width), mode="bicubic", align_corners=False
    )
    return smooth[0].permute(1, 2, 0).clamp(0, 255).numpy().astype(np.uint8)


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
    image = picture(*size)
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
