"""TinyViT: strips against the whole map, batches against single images, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsam_jax.models import tiny_vit
from medsam_jax.models.functional import Functional
from medsam_jax.ops import convolution, strips, windows
from medsam_jax.ops.form import CPU, PLAIN
from tests.tiny import tiny_sam


@pytest.fixture(scope="module", autouse=True)
def short_strips():
    """Several strips in each block, as larger maps have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_STRIP_BYTES", 1 << 17)
        patch.setattr(windows, "_STRIP_BYTES", 1)
        patch.setattr(strips, "_TOKENS", 64)
        yield


@pytest.fixture(scope="module")
def encoder():
    """Biases are drawn too: at the border of the image zeros and biases must not be mixed up."""
    functional = Functional(tiny_sam().image_encoder)
    rng = np.random.default_rng(1)
    functional.arrays = {
        name: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32)
        if name.endswith(("bias", "mean", "attention_biases"))
        else x
        for name, x in functional.arrays.items()
    }
    return functional


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).random((3, 64, 64, 3)), jnp.float32)


def encode(encoder, images, form=CPU):
    encoder.form = form

    def image_encoder(arrays, x):
        return strips.image_by_image(encoder.bind(arrays), x, form)

    return jax.jit(image_encoder)(encoder.arrays, images)


@pytest.fixture(scope="module")
def embeddings(encoder, images):
    return encode(encoder, images)


def test_strips_equal_the_whole_map(encoder, images, embeddings):
    whole = encode(encoder, images, PLAIN)
    np.testing.assert_allclose(embeddings, whole, atol=1e-5 * np.abs(whole).max())


def test_a_batch_equals_single_images(encoder, images, embeddings):
    single = encode(encoder, images[1:2])
    np.testing.assert_allclose(embeddings[1:2], single, atol=1e-6 * np.abs(single).max())


def test_gradients_of_strips_equal_those_of_the_whole_map(encoder):
    """Compares gradients for each kind of block, with the input channels that the block takes."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, 32, 20, 16)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((2, 32, 20, 16)), jnp.float32)

    def gradients(form):
        encoder.form = form

        def loss(arrays, x):
            first, _, third, _ = encoder.bind(arrays).layers
            outputs = first.blocks[0](x[..., :8]), third.blocks[0](x)
            return sum((y * weights[..., : y.shape[-1]]).mean() for y in outputs)

        by_array, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(encoder.arrays, x)
        return {**by_array, "x": by_x}

    in_strips, whole = gradients(CPU), gradients(PLAIN)
    largest = max(np.abs(gradient).max() for gradient in whole.values())
    for name, gradient in whole.items():
        scale = max(np.abs(gradient).max(), 1e-3 * largest)  # some are sums that cancel to nothing
        np.testing.assert_allclose(in_strips[name], gradient, atol=1e-4 * scale, err_msg=name)
    assert sum(np.any(gradient) for gradient in whole.values()) > 20


@pytest.mark.parametrize(("height", "width"), [(9, 11), (8, 11), (3, 3)])
def test_windows_beyond_the_map_hold_zero_tokens(height, width):
    """Compares with PyTorch's definition: the map is padded with zeros, whose tokens attend too."""
    window, dim = 4, 8
    block = tiny_vit.TinyViTBlock(dim, 2, window, 1.0, dtype=None, rngs=nnx.Rngs(0))
    graph, state = nnx.split(block)
    rng = np.random.default_rng(0)
    block = nnx.merge(
        graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), state)
    )
    x = jnp.asarray(rng.standard_normal((2, height, width, dim)), jnp.float32)
    rows, columns = -(-height // window), -(-width // window)
    padded = jnp.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    expected = np.empty_like(padded)
    for row, column in np.ndindex(rows, columns):
        y, x0 = row * window, column * window
        part = np.s_[:, y : y + window, x0 : x0 + window]
        expected[part] = block.attn(padded[part])
    for form in (PLAIN, CPU):
        found = windows.attend_in_windows(block.attn, x, window, form)
        np.testing.assert_allclose(found, expected[:, :height, :width], atol=1e-5, rtol=1e-5)
