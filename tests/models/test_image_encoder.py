"""The ViT encoder: stored answers of PyTorch, other input sizes, half precision, gradients."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsam_jax.models.functional import Functional
from medsam_jax.models.image_encoder import ImageEncoderViT, ViTConfig, resize_position_tables
from medsam_jax.models.sam import SamConfig
from medsam_jax.ops import attention, strips, windows
from medsam_jax.ops.form import ACCELERATOR, CPU
from tests.tiny import update_state

CONFIG = ViTConfig(24, 3, 2, (1,), patch_size=4, window_size=3)
MADE_AT = 32


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "vit.npz") as file:
        images = {k: jnp.asarray(v) for k, v in file.items() if k.startswith("image/")}
        return dict(file) | images


@pytest.fixture(scope="module")
def params(golden):
    return {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}


def make_encoder(params, image_size, dtype=jnp.float32, **changes) -> ImageEncoderViT:
    config = dataclasses.replace(CONFIG, **changes)
    encoder = ImageEncoderViT(config, image_size, 8, dtype=dtype, rngs=nnx.Rngs(0))
    update_state(encoder, resize_position_tables(params, config, image_size, prefix=""))
    return encoder


@pytest.mark.parametrize("image_size", [20, 32, 48])
def test_equals_pytorch(golden, params, image_size):
    embedding = make_encoder(params, image_size)(golden[f"image/{image_size}"])
    expected = golden[f"embedding/{image_size}"]
    np.testing.assert_allclose(embedding, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", [CPU, ACCELERATOR], ids=lambda form: form.device)
def test_the_forms_of_devices_equal_the_plain_one(golden, params, monkeypatch, form):
    """Small strips, also of single heads, as used for large images on a CPU."""
    monkeypatch.setattr(windows, "_STRIP_BYTES", 1)
    monkeypatch.setattr(strips, "_TOKENS", 36)
    monkeypatch.setattr(attention, "_CPU_SCORES_BYTES", (1 << 12, 1 << 14))
    encoder = make_encoder(params, 48)
    images = jnp.concatenate([golden["image/48"], golden["image/48"][:, ::-1]])
    functional = Functional(encoder, form)
    found = jax.jit(lambda arrays: functional.bind(arrays)(images))(functional.arrays)
    plain = jax.jit(encoder)(images)
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())


def test_resizing_keeps_what_fits(params):
    same = resize_position_tables(params, CONFIG, MADE_AT, prefix="")
    assert all(same[path] is params[path] for path in params)
    larger = resize_position_tables(params, CONFIG, 48, prefix="")
    changed = {path for path in params if larger[path] is not params[path]}
    assert changed == {"pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"}
    # A table that is linear in the offset stays linear under linear interpolation.
    ramp = {**params, "blocks.1.attn.rel_pos_h": np.tile(np.arange(15.0)[:, None], 12)}
    resized = resize_position_tables(ramp, CONFIG, 64, prefix="")["blocks.1.attn.rel_pos_h"]
    expected = np.clip((np.arange(31) + 0.5) * 15 / 31 - 0.5, 0, 14)
    np.testing.assert_allclose(resized[:, 0], expected, rtol=1e-5)


def test_half_precision_with_float32_parameters(golden, params):
    encoder = make_encoder(params, MADE_AT, jnp.bfloat16)
    embedding = encoder(golden["image/32"])
    assert embedding.dtype == jnp.bfloat16
    assert encoder.blocks[0].attn.qkv.kernel.dtype == jnp.float32
    expected = golden["embedding/32"]
    # bfloat16 has 8 bits: 4e-3 a rounding, some twenty of them in three blocks
    difference = np.abs(embedding.astype(jnp.float32) - expected)
    assert difference.max() <= 0.05 * np.abs(expected).max()


def test_remat_changes_no_gradient_and_keeps_block_inputs_only(golden, params):
    image = golden["image/32"]

    def gradients(remat):
        functional = Functional(make_encoder(params, MADE_AT, remat=remat))
        weights = jnp.asarray(golden["embedding/32"])

        def loss(arrays):
            return (functional.bind(arrays)(image) * weights).mean()

        kept = jax.eval_shape(lambda arrays: jax.vjp(loss, arrays)[1], functional.arrays)
        kept_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
        return jax.jit(jax.grad(loss))(functional.arrays), kept_bytes

    plain, plain_bytes = gradients(remat=False)
    remat, remat_bytes = gradients(remat=True)
    for path, gradient in plain.items():
        np.testing.assert_allclose(remat[path], gradient, rtol=1e-4, atol=1e-7, err_msg=path)
    # Beside the parameters each block keeps its input, 12 kB, of some 30 arrays of that size.
    assert remat_bytes < 0.3 * plain_bytes


def test_refuses_other_sizes(params):
    with pytest.raises(ValueError, match="image_size 30 is no multiple of 4"):
        ImageEncoderViT(CONFIG, 30, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="takes 32 x 32 pixels"):
        make_encoder(params, MADE_AT)(jnp.zeros((1, 48, 48, 3)))


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_b", 89.670912), ("vit_l", 308.278272), ("vit_h", 637.026048)]
)
def test_published_sizes(name, millions):
    """Parameters as `sum(p.numel() for p in sam.image_encoder.parameters())` counts them."""
    config = getattr(SamConfig, name)()
    encoder = nnx.eval_shape(
        lambda: ImageEncoderViT(config.encoder, config.image_size, 256, rngs=nnx.Rngs(0))
    )
    counts = [np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(encoder))]
    assert sum(counts) == round(millions * 1e6)
