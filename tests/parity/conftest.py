"""A SAM of segment_anything with a small encoder and random weights, and ours with the same.

Prompt encoder, mask decoder and input size are SAM's own.
"""

import dataclasses
import functools

import jax
import pytest
import torch
from flax import nnx

from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import Sam, SamConfig
from tests.parity.torch_models import flax_variables, randomise, stub_torchvision
from tests.tiny import update_state

with stub_torchvision():
    from segment_anything import modeling

jax.config.update("jax_default_matmul_precision", "highest")  # as docs/parity.md says

ENCODER = ViTConfig(32, 2, 2, (1,))


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def jax_sam(torch_sam):
    config = dataclasses.replace(SamConfig.vit_b(), encoder=ENCODER)
    model = nnx.eval_shape(lambda: Sam(config, rngs=nnx.Rngs(0)))
    update_state(model, flax_variables(torch_sam.state_dict()))
    return model
