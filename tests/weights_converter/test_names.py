"""The name tables, against names written out by hand."""

import numpy as np
import pytest

from weights_converter import names

# segment_anything's name, transformers' name: one of each kind (from the models' own state dicts).
PAIRS = [
    ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
    ("image_encoder.patch_embed.proj.bias", "vision_encoder.patch_embed.projection.bias"),
    ("image_encoder.blocks.11.norm2.weight", "vision_encoder.layers.11.layer_norm2.weight"),
    ("image_encoder.blocks.3.attn.qkv.weight", "vision_encoder.layers.3.attn.qkv.weight"),
    ("image_encoder.blocks.3.attn.rel_pos_h", "vision_encoder.layers.3.attn.rel_pos_h"),
    ("image_encoder.blocks.3.mlp.lin2.bias", "vision_encoder.layers.3.mlp.lin2.bias"),
    ("image_encoder.neck.3.bias", "vision_encoder.neck.layer_norm2.bias"),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings.3.weight", "prompt_encoder.point_embed.3.weight"),
    ("prompt_encoder.mask_downscaling.4.weight", "prompt_encoder.mask_embed.layer_norm2.weight"),
    ("prompt_encoder.mask_downscaling.6.bias", "prompt_encoder.mask_embed.conv3.bias"),
    (
        "mask_decoder.transformer.layers.1.norm4.bias",
        "mask_decoder.transformer.layers.1.layer_norm4.bias",
    ),
    (
        "mask_decoder.transformer.layers.0.cross_attn_image_to_token.q_proj.weight",
        "mask_decoder.transformer.layers.0.cross_attn_image_to_token.q_proj.weight",
    ),
    (
        "mask_decoder.transformer.norm_final_attn.weight",
        "mask_decoder.transformer.layer_norm_final_attn.weight",
    ),
    ("mask_decoder.output_upscaling.1.weight", "mask_decoder.upscale_layer_norm.weight"),
    ("mask_decoder.output_upscaling.3.bias", "mask_decoder.upscale_conv2.bias"),
    (
        "mask_decoder.output_hypernetworks_mlps.2.layers.1.weight",
        "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight",
    ),
    (
        "mask_decoder.iou_prediction_head.layers.2.bias",
        "mask_decoder.iou_prediction_head.proj_out.bias",
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_pairs_both_ways(ours, theirs):
    assert names.to_naming(ours, "transformers") == theirs
    assert names.from_naming(theirs, "transformers") == ours


@pytest.mark.parametrize(
    "name",
    [
        "x.vision_encoder.pos_embed",
        "vision_encoder.pos_embed.x",
        "vision_encoder.pos_embed\n",
        "vision_encoder.layers.one.layer_norm1.weight",
        "mask_decoder.iou_prediction_head.layers.2.bias.extra",
    ],
)
def test_patterns_match_whole_names_only(name):
    assert names.from_naming(name, "transformers") is None


@pytest.mark.parametrize(
    ("path", "ours", "name", "torch"),
    [
        ("a.qkv.kernel", (5, 7), "a.qkv.weight", (7, 5)),
        ("a.neck.0.kernel", (3, 2, 5, 7), "a.neck.0.weight", (7, 5, 3, 2)),
        ("a.norm.scale", (5,), "a.norm.weight", (5,)),
        ("a.point_embeddings.0.embedding", (1, 5), "a.point_embeddings.0.weight", (1, 5)),
        ("a.bn.mean", (5,), "a.bn.running_mean", (5,)),
        ("a.bn.var", (5,), "a.bn.running_var", (5,)),
    ],
)
def test_leaf_rules(path, ours, name, torch):
    found, leaf = names.torch_leaf(path, len(ours))
    assert found == name
    value = np.arange(np.prod(torch)).reshape(torch)
    assert leaf.to_ours(value).shape == ours
    assert leaf.torch_shape(ours) == torch
    np.testing.assert_array_equal(leaf.to_torch(leaf.to_ours(value)), value)


def test_convolution_values_move_as_documented():
    _, leaf = names.torch_leaf("a.kernel", 4)
    value = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)  # [out, in, h, w]
    assert leaf.to_ours(value)[4, 6, 2, 1] == value[1, 2, 4, 6]  # [h, w, in, out]


def test_unknown_variable_is_a_defect():
    with pytest.raises(ValueError, match="no rule for variable 'a.gamma' with 1 axes"):
        names.torch_leaf("a.gamma", 1)
