"""Attention in the mask decoder between the few tokens of a prompt and the many image pixels.

Plain form of both functions: a call of the attention module. A score `(Wq t) . (Wk x)` equals
`(Wk^T Wq t) . x`, and a weighted sum of `Wv x` is `Wv` times the weighted sum of `x`. So all
projections can be applied to the tokens. Then no pixel is projected, pixels need no axis for heads,
and no intermediate array has the size of the image. For `tokens >= d` projecting the pixels is
cheaper.

The softmax is in float32. The key bias shifts all scores of a token equally, so it is left out.
Gradients are defined here with pixels first. jax's own gradients of keys and values are channels by
pixels, and every operation that adds them transposes them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medsam_jax.ops.form import Form


def tokens_to_image(
    attention: Any,
    q: Float[Array, "b p t c"],
    k: Float[Array, "b p2 n c"],
    v: Float[Array, "b p2 n c"],
    image_shared: bool,
    form: Form,
) -> Float[Array, "b p t c"]:
    """Attention of tokens to pixels. Plain form: `attention(q, k, v)`.

    `attention` is a `models.transformer.Attention`; `p2` is p, or 1 if the prompts share an image.
    With `image_shared` other prompts have the same image, and its projections are computed once,
    outside the loop of `ops.prompt_loop`.
    """
    if not form.cpu or image_shared or q.shape[2] >= attention.head_dim:
        return attention(q, k, v)
    q = attention.separate_heads(attention.q_proj(q))
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    value_bias = _bias(attention, attention.v_proj)
    out = tokens_to_pixels(
        q, k, v, _kernel(attention, attention.k_proj), _kernel(attention, attention.v_proj)
    )
    return attention.out_proj(attention.recombine_heads(out + value_bias))


def image_to_tokens(
    attention: Any,
    q: Float[Array, "b p2 n c"],
    k: Float[Array, "b p t c"],
    v: Float[Array, "b p t c"],
    key_valid: Bool[Array, "b p t"] | None,
    form: Form,
) -> Float[Array, "b p n c"]:
    """Attention of pixels to tokens. Plain form: `attention(q, k, v, key_valid)`."""
    if not form.cpu or k.shape[2] >= attention.head_dim:
        return attention(q, k, v, key_valid)
    k = attention.separate_heads(attention.k_proj(k))
    v = attention.separate_heads(attention.v_proj(v))
    return pixels_to_tokens(
        q.astype(k.dtype),
        k,
        v,
        _kernel(attention, attention.q_proj),
        _bias(attention, attention.q_proj),
        _kernel(attention, attention.out_proj, axis=0),
        attention.out_proj.bias[...].astype(k.dtype),
        key_valid,
    )


def _kernel(attention: Any, linear: Any, axis: int = 1) -> Array:
    """Returns a linear layer's kernel in the compute dtype, its inner axis split into heads."""
    kernel = linear.kernel[...].astype(linear.dtype)
    inner = (attention.num_heads, attention.head_dim)
    return kernel.reshape(*kernel.shape[:axis], *inner, *kernel.shape[axis + 1 :])


def _bias(attention: Any, linear: Any) -> Float[Array, "heads d"]:
    bias = linear.bias[...].astype(linear.dtype)
    return bias.reshape(attention.num_heads, attention.head_dim)


def tokens_to_pixels(
    q: Float[Array, "b p t heads d"],
    keys: Float[Array, "b p n c"],
    values: Float[Array, "b p n c"],
    key_kernel: Float[Array, "c heads d"],
    value_kernel: Float[Array, "c heads d"],
) -> Float[Array, "b p t heads d"]:
    """Sums of values over pixels; `q` is projected, `keys` and `values` are not."""
    q = jnp.einsum("bpthd,chd->bpthc", q * q.shape[-1] ** -0.5, key_kernel)
    gathered = _gather(_merged(q), keys, values).reshape(q.shape)
    return jnp.einsum("bpthc,chd->bpthd", gathered, value_kernel)


@jax.custom_vjp
def _gather(
    q: Float[Array, "b p k c"], keys: Float[Array, "b p n c"], values: Float[Array, "b p n c"]
) -> Float[Array, "b p k c"]:
    """Attention of merged tokens and heads to pixels, without projections."""
    return _gather_forward(q, keys, values)[0]


def _gather_forward(q, keys, values):
    weights = jax.nn.softmax(_scores(keys, q), axis=-2).astype(values.dtype)  # [B, P, N, K]
    gathered = _sum_over_pixels(weights, values)
    return gathered, (q, keys, values, weights, gathered)


def _gather_backward(saved, gradient):
    q, keys, values, weights, gathered = saved
    # Mean over the pixels, weighted by the attention weights, of the weights' gradient.
    mean = jnp.einsum("bpkc,bpkc->bpk", gradient, gathered, preferred_element_type=jnp.float32)
    by_scores = weights * (_scores(values, gradient) - mean[..., None, :])
    by_scores = by_scores.astype(keys.dtype)
    return _sum_over_pixels(by_scores, keys), by_scores @ q, weights @ gradient


_gather.defvjp(_gather_forward, _gather_backward)


def pixels_to_tokens(
    queries: Float[Array, "b p2 n c"],
    k: Float[Array, "b p t heads d"],
    v: Float[Array, "b p t heads d"],
    query_kernel: Float[Array, "c heads d"],
    query_bias: Float[Array, "heads d"],
    out_kernel: Float[Array, "heads d c"],
    out_bias: Float[Array, "c"],
    key_valid: Bool[Array, "b p t"] | None,
) -> Float[Array, "b p n c"]:
    """Sums of values over tokens, projected out; `k` and `v` are projected, `queries` are not."""
    k = k * k.shape[-1] ** -0.5
    bias = jnp.einsum("bpthd,hd->bpth", k, query_bias, preferred_element_type=jnp.float32)
    if key_valid is not None:
        bias = jnp.where(key_valid[..., None], bias, -jnp.inf)
    k = jnp.einsum("bpthd,chd->bpthc", k, query_kernel)
    # The weights of a pixel for the tokens of a head add up to 1, so the output bias can be added
    # to the values of one head.
    v = jnp.einsum("bpthd,hdc->bpthc", v, out_kernel).at[..., 0, :].add(out_bias)
    return _distribute(queries, _merged(k), bias, _merged(v))


@jax.custom_vjp
def _distribute(
    queries: Float[Array, "b p2 n c"],
    k: Float[Array, "b p k c"],
    bias: Float[Array, "b p t heads"],
    v: Float[Array, "b p k c"],
) -> Float[Array, "b p n c"]:
    """Attention of pixels to merged tokens and heads, without projections."""
    return _distribute_forward(queries, k, bias, v)[0]


def _distribute_forward(queries, k, bias, v):
    scores = _scores(queries, k)
    scores = scores.reshape(*scores.shape[:-1], *bias.shape[2:])  # [B, P, N, T, heads]
    weights = jax.nn.softmax(scores + bias[:, :, None], axis=-2).astype(v.dtype)
    return weights.reshape(*weights.shape[:3], -1) @ v, (queries, k, v, weights)


def _distribute_backward(saved, gradient):
    queries, k, v, weights = saved
    shares = weights * _scores(gradient, v).reshape(weights.shape)
    # Token by token: XLA:CPU gives a sum to library kernels, which are slow where only the heads
    # lie behind the axis.
    total = sum(shares[..., token, :] for token in range(shares.shape[-2]))
    by_scores = shares - weights * total[..., None, :]
    by_bias = jnp.sum(by_scores, axis=2)
    by_scores = by_scores.reshape(*by_scores.shape[:3], -1).astype(k.dtype)
    by_v = _sum_over_pixels(weights.reshape(by_scores.shape), gradient)
    by_queries = by_scores @ k
    if queries.shape[1] < k.shape[1]:
        by_queries = jnp.sum(by_queries, axis=1, keepdims=True)
    return by_queries, _sum_over_pixels(by_scores, queries), by_bias, by_v


_distribute.defvjp(_distribute_forward, _distribute_backward)


def _scores(
    pixels: Float[Array, "b p2 n c"], tokens: Float[Array, "b p k c"]
) -> Float[Array, "b p n k"]:
    # Pixels first: with tokens first, XLA:CPU transposes the image. `einsum` would repeat the
    # pixels for every prompt if p2 is 1.
    return jnp.matmul(pixels, tokens.swapaxes(-1, -2), preferred_element_type=jnp.float32)


def _sum_over_pixels(
    weights: Float[Array, "b p n k"], pixels: Float[Array, "b p2 n c"]
) -> Float[Array, "b p k c"]:
    # Transposed first, behind a barrier: XLA:CPU has its fast product for rows by columns only.
    return jax.lax.optimization_barrier(weights.swapaxes(-1, -2)) @ pixels


def _merged(x: Float[Array, "b p t heads c"]) -> Float[Array, "b p t*heads c"]:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
