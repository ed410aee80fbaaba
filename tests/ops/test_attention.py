"""Grid attention: each form against the scores written out whole, and what it holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops import attention
from medsam_jax.ops.form import ACCELERATOR, CPU, PLAIN


def random_inputs(batch, rows, columns, heads, head_dim):
    rng = np.random.default_rng(0)
    shapes = [(batch, rows, columns, heads, head_dim)] * 3
    shapes += [(rows, rows, head_dim), (columns, columns, head_dim)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def attend(q, k, v, rel_h, rel_w, form):
    """`grid_attention` of separate arrays [b, y, x, heads, d]."""
    qkv = jnp.stack([q, k, v], axis=3).reshape(len(q), -1, 3, *q.shape[3:])
    return attention.grid_attention(qkv, rel_h, rel_w, form).reshape(q.shape)


def whole(q, k, v, rel_h, rel_w):
    """Computes scores and bias of every pair of positions in float64, as in SAM's code."""
    q, k, v, rel_h, rel_w = (np.asarray(x, np.float64) for x in (q, k, v, rel_h, rel_w))
    scores = np.einsum("byxnd,bijnd->bnyxij", q, k) * q.shape[-1] ** -0.5
    scores += np.einsum("byxnd,yid->bnyxi", q, rel_h)[..., :, None]
    scores += np.einsum("byxnd,xjd->bnyxj", q, rel_w)[..., None, :]
    weights = np.exp(scores - scores.max(axis=(-2, -1), keepdims=True))
    weights /= weights.sum(axis=(-2, -1), keepdims=True)
    return np.einsum("bnyxij,bijnd->byxnd", weights, v)


SHAPES = [(2, 14, 14, 3, 8), (1, 5, 7, 2, 16), (1, 32, 32, 1, 8)]


@pytest.mark.parametrize("form", [PLAIN, ACCELERATOR], ids=lambda form: form.device)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_form_and_accelerators(shape, form):
    inputs = random_inputs(*shape)
    np.testing.assert_allclose(attend(*inputs, form), whole(*inputs), atol=1e-5)


@pytest.mark.parametrize("scores_bytes", [1, 1 << 15, 1 << 28])
@pytest.mark.parametrize("shape", SHAPES)
def test_strips_equal_whole_scores(monkeypatch, shape, scores_bytes):
    monkeypatch.setattr(attention, "_CPU_SCORES_BYTES", (scores_bytes,) * 2)
    inputs = random_inputs(*shape)
    np.testing.assert_allclose(attend(*inputs, CPU), whole(*inputs), atol=1e-5)


@pytest.mark.parametrize("form", [CPU, ACCELERATOR], ids=lambda form: form.device)
def test_gradients_of_strips(monkeypatch, form):
    monkeypatch.setattr(attention, "_CPU_SCORES_BYTES", (1 << 12,) * 2)
    inputs = random_inputs(1, 6, 6, 2, 4)

    def by_whole(q, k, v, rel_h, rel_w):
        scores = jnp.einsum("byxnd,bijnd->bnyxij", q, k) * q.shape[-1] ** -0.5
        scores += jnp.einsum("byxnd,yid->bnyxi", q, rel_h)[..., :, None]
        scores += jnp.einsum("byxnd,xjd->bnyxj", q, rel_w)[..., None, :]
        weights = jax.nn.softmax(scores, axis=(-2, -1))
        return jnp.einsum("bnyxij,bijnd->byxnd", weights, v)

    def in_strips(*inputs):
        return attend(*inputs, form)

    def loss(attend):
        return lambda *inputs: (jnp.sin(attend(*inputs)) ** 2).sum()

    every = tuple(range(5))
    ours = jax.jit(jax.grad(loss(in_strips), every))(*inputs)
    expected = jax.jit(jax.grad(loss(by_whole), every))(*inputs)
    for our, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(our, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("form", [CPU, ACCELERATOR], ids=lambda form: form.device)
def test_never_holds_all_scores(form):
    """Twelve heads of 4096 tokens: whole scores would be 805 MB."""
    shapes = [(1, 64, 64, 12, 64)] * 3 + [(64, 64, 64)] * 2
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(attend, static_argnums=5).lower(*inputs, form).compile()
    assert (
        compiled.memory_analysis().temp_size_in_bytes
        < {"cpu": 200e6, "accelerator": 700e6}[form.device]
    )
