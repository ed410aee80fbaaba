"""A linear layer with GELU: the kernel in interpret mode, and the gradient that goes with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops import dense_triton
from medsam_jax.ops.activation import dense_gelu, gelu
from medsam_jax.ops.form import ACCELERATOR, PLAIN


def layer(rows, dtype, width=128):
    rng = np.random.default_rng(0)
    shapes = (1, rows, width), (width, 256), (256,)
    x, kernel, bias = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, kernel / np.sqrt(width).astype(dtype), bias


@pytest.mark.parametrize("width", [128, 160])  # 160: of LiteMedSAM
@pytest.mark.parametrize("rows", [128, 200])  # a whole tile, and more
def test_kernel(rows, width):
    x, kernel, bias = layer(rows, jnp.float32, width)
    assert dense_triton.fits(kernel)
    out, inner = dense_triton.dense_gelu(x, kernel, bias, with_inner=True, interpret=True)
    np.testing.assert_allclose(inner, x @ kernel + bias, atol=1e-5)
    np.testing.assert_allclose(out, gelu(x @ kernel + bias), atol=1e-5)


def test_gradient_in_half_precision():
    given = layer(8, jnp.bfloat16)

    def loss(form):
        return lambda *given: dense_gelu(*given, form).astype(jnp.float32).sum()

    found = jax.jit(jax.grad(loss(ACCELERATOR), (0, 1, 2)))(*given)
    expected = jax.jit(jax.grad(loss(PLAIN), (0, 1, 2)))(*given)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))
