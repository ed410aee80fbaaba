"""SAM's ViT encoder against `segment_anything`, on random weights: every layer and the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from medsam_jax.models.image_encoder import ImageEncoderViT, ViTConfig, resize_position_tables
from tests.parity.torch_models import flax_variables, randomise, stub_torchvision
from tests.tiny import update_state

with stub_torchvision():
    from segment_anything.modeling import ImageEncoderViT as TorchImageEncoderViT

CONFIGS = {
    "vit_b": ViTConfig.vit_b(),
    # True widths, a windowed and a global block: all that differs between the sizes.
    "vit_l": dataclasses.replace(ViTConfig.vit_l(), depth=2, global_attn_indexes=(1,)),
    "vit_h": dataclasses.replace(ViTConfig.vit_h(), depth=2, global_attn_indexes=(1,)),
}


@functools.cache
def torch_encoder(name: str) -> TorchImageEncoderViT:
    config = CONFIGS[name]
    torch.manual_seed(0)
    encoder = TorchImageEncoderViT(
        img_size=1024,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        out_chans=256,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window_size,
        global_attn_indexes=config.global_attn_indexes,
    )
    randomise(encoder, seed=1)
    return encoder.eval()


def jax_encoder(name: str, image_size: int) -> ImageEncoderViT:
    config = CONFIGS[name]
    variables = flax_variables(torch_encoder(name).state_dict())
    encoder = nnx.eval_shape(lambda: ImageEncoderViT(config, image_size, 256, rngs=nnx.Rngs(0)))
    update_state(encoder, resize_position_tables(variables, config, image_size, prefix=""))
    return encoder


@torch.no_grad()
def run_torch(
    name: str, images: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """The embedding [B, h, w, C], and input and output of each block."""
    encoder, layers = torch_encoder(name), []
    hooks = [
        block.register_forward_hook(
            lambda _, inputs, output: layers.append((inputs[0].numpy(), output.numpy()))
        )
        for block in encoder.blocks
    ]
    pos_embed = encoder.pos_embed
    size = images.shape[1] // 16
    resized = torch.nn.functional.interpolate(
        pos_embed.permute(0, 3, 1, 2), (size, size), mode="bilinear", align_corners=False
    )
    encoder.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1))
    try:
        embedding = encoder(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    finally:
        encoder.pos_embed = pos_embed
        for hook in hooks:
            hook.remove()
    return embedding.permute(0, 2, 3, 1).numpy(), layers


def relative_error(ours, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "image_size", "batch"),
    [
        ("vit_b", 1024, 1),
        ("vit_b", 512, 1),
        ("vit_b", 256, 2),
        ("vit_l", 512, 1),
        ("vit_h", 512, 1),
        ("vit_h", 320, 1),  # a grid of 20: two windows of 14, the second mostly padding
    ],
)
def test_layers_and_embedding(name, image_size, batch):
    images = np.random.default_rng(0).standard_normal(
        (batch, image_size, image_size, 3), np.float32
    )
    expected, layers = run_torch(name, images)
    encoder = jax_encoder(name, image_size)

    @functools.partial(jax.jit, static_argnums=0)
    def apply(graph, state, x):
        return nnx.merge(graph, state)(x)

    for index, (block, (block_input, block_output)) in enumerate(
        zip(encoder.blocks, layers, strict=True)
    ):
        error = relative_error(apply(*nnx.split(block), jnp.asarray(block_input)), block_output)
        assert error <= 1e-5, f"block {index}: {error:.1e} of the maximum"
    assert relative_error(apply(*nnx.split(encoder), images), expected) <= 1e-4
