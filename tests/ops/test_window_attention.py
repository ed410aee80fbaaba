"""Attention in windows: the kernels for TPU and GPU, interpreted, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops import window_attention as attention
from medsam_jax.ops import window_tpu, window_triton
from medsam_jax.ops.form import ACCELERATOR, CPU, PLAIN

# Windows, tokens, heads, length of a vector; 7 x 7 and 14 x 14 tokens are LiteMedSAM's.
SIZES = [(6, 49, 2, 32), (2, 196, 3, 32), (3, 64, 1, 16), (5, 70, 2, 20)]


def inputs(size, dtype):
    windows, tokens, heads, head_dim = size
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((windows, tokens, heads, 3, head_dim))
    biases = rng.standard_normal((heads, tokens, tokens))
    return jnp.asarray(2 * qkv, dtype), jnp.asarray(biases, jnp.float32)


def exactly(qkv, biases):
    """The definition in float64."""
    q, k, v = np.moveaxis(np.asarray(qkv, np.float64), 3, 0)
    scores = np.einsum("wnhd,wmhd->whnm", q, k) * q.shape[-1] ** -0.5 + np.asarray(biases)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("whnm,wmhd->wnhd", weights, v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel", [window_tpu.forward, window_triton.forward], ids=["tpu", "gpu"])
def test_kernels_follow_the_definition(kernel, size, dtype):
    qkv, biases = inputs(size, dtype)
    found = kernel(qkv, biases, interpret=True)
    assert found.dtype == qkv.dtype
    tolerance = 1e-5 if dtype == "float32" else 3e-2  # bfloat16 has three digits, values up to 7
    np.testing.assert_allclose(
        np.asarray(found, np.float64), exactly(qkv, biases), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("form", [PLAIN, CPU, ACCELERATOR], ids=lambda form: form.device)
def test_values_and_gradients_of_each_form(form):
    qkv, biases = inputs(SIZES[0], "float32")

    def total(qkv, biases, attend):
        return jnp.sum(jnp.sin(attend(qkv, biases)))

    def in_form(qkv, biases):
        return attention.window_attention(qkv, biases, form)

    np.testing.assert_allclose(in_form(qkv, biases), exactly(qkv, biases), atol=1e-5)
    found = jax.grad(total, (0, 1))(qkv, biases, in_form)
    expected = jax.grad(total, (0, 1))(qkv, biases, attention._attend)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_kernels_are_in_the_programs_for_accelerators_alone():
    qkv, biases = inputs(SIZES[0], "bfloat16")

    def lowered(form, platform):
        function = jax.jit(lambda *x: attention.window_attention(*x, form))
        return function.trace(qkv, biases).lower(lowering_platforms=(platform,)).as_text()

    assert "tpu_custom_call" in lowered(ACCELERATOR, "tpu")
    assert "triton" in lowered(ACCELERATOR, "cuda")
    assert "custom_call" not in lowered(ACCELERATOR, "cpu")
    assert "custom_call" not in lowered(ACCELERATOR, "rocm")
    assert "custom_call" not in lowered(PLAIN, "tpu")
