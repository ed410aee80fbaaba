"""The flash kernels in interpret mode against the plain form, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops import flash_tpu, flash_triton
from medsam_jax.ops.attention import position_bias

KERNELS = pytest.mark.parametrize(
    "kernels", [flash_tpu, flash_triton], ids=lambda module: module.__name__.split("_")[-1]
)
GRIDS = [  # batch, rows, columns, heads, head_dim
    (2, 7, 7, 2, 32),
    (1, 14, 14, 2, 64),
    (1, 5, 7, 2, 16),
    (1, 9, 12, 1, 80),  # vit_h's vectors
    (1, 33, 36, 1, 16),  # 1188 tokens are neither a multiple of 64 nor of 128
    (1, 10, 128, 1, 16),
]
TYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def inputs(batch, rows, columns, heads, head_dim, dtype=jnp.float32):
    """Queries, keys and values in one array, and the bias by key row and key column."""
    rng = np.random.default_rng(0)
    tokens = batch, rows * columns
    shapes = (*tokens, 3, heads, head_dim), (*tokens, heads, rows), (*tokens, heads, columns)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def plain(qkv, bias_h, bias_w):
    """Softmax over all keys in float32, as the plain form of `grid_attention`."""
    q, k, v = jnp.moveaxis(qkv.astype(jnp.float32), 2, 0)
    scores = jnp.einsum("bqnd,bknd->bnqk", q * q.shape[-1] ** -0.5, k)
    bias = bias_h.astype(jnp.float32)[..., None] + bias_w.astype(jnp.float32)[..., None, :]
    scores += jnp.moveaxis(bias, 2, 1).reshape(scores.shape)
    return jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores), v)


def assert_close(found, expected, dtype):
    """Sums of up to 4096 products in float32; vectors and weights have 8 bits in bfloat16."""
    relative = 2e-5 if dtype == jnp.float32 else 2e-2
    expected = np.asarray(expected, np.float32)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
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


@TYPES
@pytest.mark.parametrize("grid", GRIDS[1:4], ids=str)
def test_bias_of_queries(grid, dtype):
    qkv, *_ = inputs(*grid, dtype)
    _, rows, columns, _, head_dim = grid
    rng = np.random.default_rng(1)
    rel = [rng.standard_normal((side, side, head_dim)) for side in (rows, columns)]
    rel = [jnp.asarray(x, dtype) for x in rel]
    found = jax.jit(partial(flash_triton.position_bias, interpret=True))(qkv, *rel)
    wide = [x.astype(jnp.float32) for x in (qkv, *rel)]
    for ours, theirs in zip(found, position_bias(*wide), strict=True):
        assert_close(ours, theirs, dtype)
