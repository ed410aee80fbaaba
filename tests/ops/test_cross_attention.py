"""Projections on the tokens' side, against attention as it is usually written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsam_jax.models.transformer import Attention
from medsam_jax.ops.cross_attention import (
    image_to_tokens,
    pixels_to_tokens,
    tokens_to_image,
    tokens_to_pixels,
)
from medsam_jax.ops.form import CPU, PLAIN
from medsam_jax.ops.prompt_loop import one_prompt_after_another

BATCH, PROMPTS, TOKENS, PIXELS, CHANNELS, HEADS, DIM = 2, 3, 4, 10, 12, 2, 5


def draw(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.standard_normal(shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attend(q, k, v):
    """[n, heads, d] x [m, heads, d] -> [n, heads, d], in float64."""
    scores = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(DIM)
    return np.einsum("hnm,mhd->nhd", softmax(scores), v)


def project(x, kernel, bias):
    return np.einsum("nc,chd->nhd", x.astype(np.float64), kernel) + bias


@pytest.fixture
def kernels():
    return [draw(CHANNELS + i, HEADS, DIM)[:CHANNELS] for i in range(3)]


def test_tokens_to_pixels(kernels):
    q = draw(BATCH, PROMPTS, TOKENS, HEADS, DIM)
    keys, values = draw(2, BATCH, PROMPTS, PIXELS, CHANNELS)
    found = np.asarray(tokens_to_pixels(*map(jnp.asarray, (q, keys, values, *kernels[:2]))))
    key_bias = draw(HEADS, DIM)  # moves all scores of a token alike
    for at in np.ndindex(BATCH, PROMPTS):
        k = project(keys[at], kernels[0], key_bias)
        expected = attend(q[at], k, project(values[at], kernels[1], 0))
        np.testing.assert_allclose(found[at], expected, atol=1e-5)


def test_gradient_of_tokens_to_pixels(kernels):
    """Against what jax derives from attention with projected pixels."""

    def plain(q, keys, values, key_kernel, value_kernel):
        k = jnp.einsum("bpnc,chd->bpnhd", keys, key_kernel)
        v = jnp.einsum("bpnc,chd->bpnhd", values, value_kernel)
        scores = jnp.einsum("bpthd,bpnhd->bphtn", q, k) / np.sqrt(DIM)
        return jnp.einsum("bphtn,bpnhd->bpthd", jax.nn.softmax(scores), v)

    q = draw(BATCH, PROMPTS, TOKENS, HEADS, DIM)
    point = (q, *draw(2, BATCH, PROMPTS, PIXELS, CHANNELS), *kernels[:2])
    point = tuple(map(jnp.asarray, point))
    weights = draw(*q.shape[::-1]).T
    gradients = [
        jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), argnums=range(5))(*point)
        for f in (tokens_to_pixels, plain)
    ]
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shared", [False, True])
def test_pixels_to_tokens(kernels, shared):
    pixels = draw(BATCH, 1 if shared else PROMPTS, PIXELS, CHANNELS)
    k, v = draw(2, BATCH, PROMPTS, TOKENS, HEADS, DIM)
    bias, out_kernel = draw(HEADS, DIM), kernels[1].transpose(1, 2, 0)
    valid = np.arange(BATCH * PROMPTS * TOKENS).reshape(BATCH, PROMPTS, TOKENS) % 5 != 0
    out_bias = draw(CHANNELS)
    given = (pixels, k, v, kernels[0], bias, out_kernel, out_bias, valid)
    found = pixels_to_tokens(*map(jnp.asarray, given))
    for image, prompt in np.ndindex(BATCH, PROMPTS):
        seen = valid[image, prompt]
        q = project(pixels[image, 0 if shared else prompt], kernels[0], bias)
        gathered = attend(q, k[image, prompt, seen], v[image, prompt, seen])
        expected = np.einsum("nhd,hdc->nc", gathered, out_kernel) + out_bias
        np.testing.assert_allclose(found[image, prompt], expected, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_of_pixels_to_tokens(kernels, shared):
    """Against what jax derives from attention with projected pixels; one token is not valid."""
    valid = jnp.arange(TOKENS) < np.full((BATCH, PROMPTS, 1), TOKENS - 1)

    def plain(pixels, k, v, query_kernel, query_bias, out_kernel, out_bias, valid):
        pixels = jnp.broadcast_to(pixels, (BATCH, PROMPTS, *pixels.shape[2:]))
        q = jnp.einsum("bpnc,chd->bpnhd", pixels, query_kernel) + query_bias
        scores = jnp.einsum("bpnhd,bpthd->bphnt", q, k) / np.sqrt(DIM)
        weights = jax.nn.softmax(jnp.where(valid[:, :, None, None], scores, -jnp.inf))
        gathered = jnp.einsum("bphnt,bpthd->bpnhd", weights, v)
        return jnp.einsum("bpnhd,hdc->bpnc", gathered, out_kernel) + out_bias

    pixels = draw(BATCH, 1 if shared else PROMPTS, PIXELS, CHANNELS)
    point = (
        *(pixels, *draw(2, BATCH, PROMPTS, TOKENS, HEADS, DIM), kernels[0], draw(HEADS, DIM)),
        *(kernels[1].transpose(1, 2, 0), draw(CHANNELS)),
    )
    point = tuple(map(jnp.asarray, point))
    weights = draw(CHANNELS, PIXELS, PROMPTS, BATCH).T
    gradients = [
        jax.grad(lambda *a, f=f: (f(*a, valid) * weights).sum(), argnums=range(7))(*point)
        for f in (pixels_to_tokens, plain)
    ]
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert not np.asarray(gradients[0][1][:, :, -1]).any(), "of the token that is not valid"


@pytest.mark.parametrize("form", [PLAIN, CPU], ids=lambda form: form.device)
def test_each_prompt_once_and_in_its_place(form):
    prompts = draw(BATCH, PROMPTS, 4), None, draw(BATCH, 1, 4)  # the last is for all prompts

    def function(own, absent, shared):
        assert absent is None
        return own * shared, own.sum(-1)

    product, total = one_prompt_after_another(function, prompts, form)
    np.testing.assert_array_equal(product, prompts[0] * prompts[2])
    np.testing.assert_allclose(total, prompts[0].sum(-1), rtol=1e-6)


def attention_module() -> Attention:
    """With random biases; eight channels a head, so seven tokens are few."""
    module = Attention(32, 4, dtype=None, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), state)
    return nnx.merge(graph, state)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [7, 8])
def test_the_forms_are_the_attention_module(tokens, shared):
    attention = attention_module()
    pixels = jnp.asarray(draw(2, 1 if shared else 3, 20, 32))
    places, words = jnp.asarray(draw(1, 1, 20, 32)), jnp.asarray(draw(2, 3, tokens, 32))
    valid = jnp.asarray(np.arange(2 * 3 * tokens).reshape(2, 3, tokens) % 5 != 1)
    found = tokens_to_image(attention, words, pixels + places, pixels, shared, CPU)
    np.testing.assert_allclose(found, attention(words, pixels + places, pixels), atol=1e-5)
    found = image_to_tokens(attention, pixels + places, words, words + 1, valid, CPU)
    expected = attention(pixels + places, words, words + 1, valid)
    np.testing.assert_allclose(found, expected, atol=1e-5)
