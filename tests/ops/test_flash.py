"""The flash kernels in interpret mode against the plain form, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops import flash_tpu, flash_triton

KERNELS = pytest.mark.parametrize(
    "kernels", [flash_tpu, flash_triton], ids=lambda module: module.__name__.split("_")[-1]
)
GRIDS = [  # batch, rows, columns, heads, head_dim
    (3, 7, 7, 2, 32),
    (2, 14, 14, 3, 64),
    (1, 5, 7, 2, 16),
    (1, 9, 12, 1, 80),  # vit_h's vectors
    (1, 33, 36, 1, 16),  # 1188 tokens are neither a multiple of 64 nor of 128
    (2, 10, 128, 1, 16),
]
TYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def inputs(batch, rows, columns, heads, head_dim, dtype=jnp.float32):
    """Scaled queries, keys, values, and the bias by key row and key column."""
    rng = np.random.default_rng(0)
    sizes = [head_dim] * 3 + [rows, columns]
    drawn = [rng.standard_normal((batch, rows, columns, heads, size)) for size in sizes]
    drawn[0] *= head_dim**-0.5
    return [jnp.asarray(x, dtype) for x in drawn]


def plain(q, k, v, bias_h, bias_w):
    """Softmax over all keys in float32, as the plain form of `grid_attention`."""
    q, k, v, bias_h, bias_w = (x.astype(jnp.float32) for x in (q, k, v, bias_h, bias_w))
    scores = jnp.einsum("byxnd,bjind->bnyxji", q, k)
    scores += jnp.moveaxis(bias_h, 3, 1)[..., None] + jnp.moveaxis(bias_w, 3, 1)[..., None, :]
    weights = jax.nn.softmax(scores, axis=(-2, -1))
    return jnp.einsum("bnyxji,bjind->byxnd", weights, v)


def assert_close(found, expected, dtype):
    """Sums of up to 4096 products in float32; vectors and weights have 8 bits in bfloat16."""
    relative = 2e-5 if dtype == jnp.float32 else 2e-2
    expected = np.asarray(expected, np.float32)
    assert found.dtype == dtype and found.shape == expected.shape
    np.testing.assert_allclose(
        np.asarray(found, np.float32), expected, atol=relative * np.abs(expected).max()
    )


@KERNELS
@TYPES
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_and_gradients(grid, dtype, kernels):
    given = inputs(*grid, dtype)
    out, sums = jax.jit(partial(kernels.forward, interpret=True))(*given)
    expected, pull_back = jax.vjp(plain, *given)
    assert_close(out, expected, dtype)
    gradient = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(dtype)
    found = jax.jit(partial(kernels.backward, interpret=True))(*given, out, sums, gradient)
    for ours, theirs in zip(found, pull_back(gradient.astype(jnp.float32)), strict=True):
        assert_close(ours, theirs, dtype)


@KERNELS
def test_global_grid(kernels):
    given = inputs(1, 64, 64, 1, 64)
    out, sums = jax.jit(partial(kernels.forward, interpret=True))(*given)
    assert_close(out, jax.jit(plain)(*given), jnp.float32)
    gradient = jnp.cos(out)
    found = jax.jit(partial(kernels.backward, interpret=True))(*given, out, sums, gradient)
    expected = jax.jit(lambda *given: jax.vjp(plain, *given)[1](gradient))(*given)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, jnp.float32)


@KERNELS
def test_large_scores_do_not_overflow(kernels):
    given = [10 * x for x in inputs(1, 9, 9, 2, 16)]
    out, sums = jax.jit(partial(kernels.forward, interpret=True))(*given)
    assert np.isfinite(sums).all()
    assert_close(out, plain(*given), jnp.float32)
