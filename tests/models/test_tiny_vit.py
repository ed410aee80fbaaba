"""TinyViT: strips against the whole map, batches against single images, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.models.common import Functional
from medsam_jax.ops.strips import traced_for
from tests.tiny import tiny_sam


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


def encode(encoder, images, platform):
    with traced_for(platform):
        return jax.jit(lambda arrays, x: encoder.bind(arrays)(x))(encoder.arrays, images)


@pytest.fixture(scope="module")
def embeddings(encoder, images):
    return encode(encoder, images, "cpu")


def test_strips_equal_the_whole_map(encoder, images, embeddings):
    whole = encode(encoder, images, "gpu")
    np.testing.assert_allclose(embeddings, whole, atol=1e-5 * np.abs(whole).max())


def test_a_batch_equals_single_images(encoder, images, embeddings):
    single = encode(encoder, images[1:2], "cpu")
    np.testing.assert_allclose(embeddings[1:2], single, atol=1e-6 * np.abs(single).max())


def test_gradients_of_strips_equal_those_of_the_whole_map(encoder, images):
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((2, 16, 16, 32)), jnp.float32)

    def gradients(platform):
        def loss(arrays):
            return (encoder.bind(arrays)(images[:2]) * weights).mean()

        with traced_for(platform):
            return jax.jit(jax.grad(loss))(encoder.arrays)

    strips, whole = gradients("cpu"), gradients("gpu")
    largest = max(np.abs(gradient).max() for gradient in whole.values())
    for name, gradient in whole.items():
        scale = max(np.abs(gradient).max(), 1e-3 * largest)  # some are sums that cancel to nothing
        np.testing.assert_allclose(strips[name], gradient, atol=1e-4 * scale, err_msg=name)
