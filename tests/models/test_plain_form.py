"""The plain form of the models works under every transformation of jax."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.models.functional import Functional
from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import SamConfig
from tests.tiny import tiny_sam

VIT = ViTConfig(16, 2, 2, (1,), patch_size=4, window_size=3)  # a block of either kind
SMALL = dataclasses.replace(SamConfig.tiny(), name="small", encoder=VIT, image_size=16)
BOXES = np.array([[[5, 6, 12, 14]]], np.float32)


@pytest.fixture(scope="module")
def functional():
    return Functional(tiny_sam(config=SMALL))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).random((2, 16, 16, 3), np.float32)


def logits_of(functional):
    def logits(arrays, pixels):
        model = functional.bind(arrays)
        boxes = jnp.broadcast_to(BOXES, (len(pixels), 1, 4))
        return model.decode(model.image_encoder(pixels), boxes=boxes)[0]

    return logits


def test_forward_mode_equals_reverse_mode(functional, pixels):
    """The derivative along a direction, by `jax.jvp` and by the gradient's product with it."""

    def loss(pixels):
        return jnp.tanh(logits_of(functional)(functional.arrays, pixels)).mean()

    direction = np.random.default_rng(1).standard_normal(pixels.shape).astype(np.float32)
    _, forward = jax.jit(lambda x: jax.jvp(loss, (x,), (direction,)))(pixels)
    reverse = (jax.jit(jax.grad(loss))(pixels) * direction).sum()
    assert abs(forward) > 1e-7
    np.testing.assert_allclose(forward, reverse, rtol=2e-4)  # sums of 1,536 products


def test_every_operation_of_tiny_vit_has_a_forward_mode():
    functional = Functional(tiny_sam())

    def loss(pixels):
        return logits_of(functional)(functional.arrays, pixels).mean()

    # Tracing fails at an operation that has none.
    pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    _, derivative = jax.eval_shape(lambda x: jax.jvp(loss, (x,), (x,)), pixels)
    assert derivative.shape == ()


def test_a_mapped_batch_equals_the_batch(functional, pixels):
    logits = logits_of(functional)
    together = jax.jit(logits)(functional.arrays, pixels)
    apart = jax.jit(jax.vmap(lambda x: logits(functional.arrays, x[None])[0]))(pixels)
    np.testing.assert_allclose(apart, together, atol=1e-5 * np.abs(together).max())


def test_export(functional, pixels):
    program = jax.export.export(jax.jit(logits_of(functional)), platforms=["cpu", "cuda", "tpu"])
    exported = program(functional.arrays, pixels)
    assert "stablehlo.while" not in exported.mlir_module()
    expected = jax.jit(logits_of(functional))(functional.arrays, pixels)
    found = exported.call(functional.arrays, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
