"""Attention between the few tokens of a prompt and the many pixels of an image.

A score is `(Wq t) . (Wk x)`, which is `(Wk^T Wq t) . x`, and a weighted sum of `Wv x` is `Wv` of
the weighted sum of `x`. With all projections on the tokens' side no pixel is projected: for 8 heads
and 7 tokens every product over the pixels has 56 columns in place of 128, heads need no axis of
their own beside the pixels, and nothing as large as the image is written in between. From
`heads * tokens` = `heads * d` on, projecting the pixels is cheaper: see `tokens_are_few`.

Softmax runs in float32. Biases of what the tokens see as keys shift all scores of a token alike, so
they are not needed; biases of values and outputs are the caller's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def tokens_are_few(tokens: int, head_dim: int) -> bool:
    """Whether the functions below cost less than projecting the pixels does."""
    return tokens < head_dim


def tokens_to_pixels(
    q: Float[Array, "b p t heads d"],
    keys: Float[Array, "b p n c"],
    values: Float[Array, "b p n c"],
    key_kernel: Float[Array, "c heads d"],
    value_kernel: Float[Array, "c heads d"],
) -> Float[Array, "b p t heads d"]:
    """What tokens gather from pixels; `q` is projected, `keys` and `values` are not."""
    q = jnp.einsum("bpthd,chd->bpthc", q * q.shape[-1] ** -0.5, key_kernel)
    gathered = _gather(_merged(q), keys, values).reshape(q.shape)
    return jnp.einsum("bpthc,chd->bpthd", gathered, value_kernel)


@jax.custom_vjp
def _gather(
    q: Float[Array, "b p k c"], keys: Float[Array, "b p n c"], values: Float[Array, "b p n c"]
) -> Float[Array, "b p k c"]:
    """Attention whose gradient is written with pixels first, as `_scores` is.

    Derived by jax, gradients of keys and values came out as channels by pixels, and were turned
    round by every operation that added them up: written out, 0.87 of the decoder's gradient.
    """
    return _gather_forward(q, keys, values)[0]


def _gather_forward(q, keys, values):
    weights = jax.nn.softmax(_scores(keys, q), axis=-2).astype(values.dtype)  # [B, P, N, K]
    gathered = jnp.einsum("bpnk,bpnc->bpkc", weights, values)
    return gathered, (q, keys, values, weights, gathered)


def _gather_backward(saved, gradient):
    q, keys, values, weights, gathered = saved
    # The gradient of the weights, averaged with the weights over the pixels.
    mean = jnp.einsum("bpkc,bpkc->bpk", gradient, gathered, preferred_element_type=jnp.float32)
    by_scores = weights * (_scores(values, gradient) - mean[..., None, :])
    by_scores = by_scores.astype(keys.dtype)
    by_q = jnp.einsum("bpnk,bpnc->bpkc", by_scores, keys)
    return by_q, by_scores @ q, weights @ gradient


_gather.defvjp(_gather_forward, _gather_backward)


def pixels_to_tokens(
    queries: Float[Array, "b p2 n c"],
    k: Float[Array, "b p t heads d"],
    v: Float[Array, "b p t heads d"],
    query_kernel: Float[Array, "c heads d"],
    query_bias: Float[Array, "heads d"],
    out_kernel: Float[Array, "heads d c"],
    key_valid: Bool[Array, "b p t"] | None,
) -> Float[Array, "b p n c"]:
    """What pixels gather from tokens, after the output kernel; `k` and `v` are projected.

    Args:
      queries: pixels, not projected; with `p2` 1 the same for all prompts of an image.
      key_valid: tokens that are not valid get no weight.
    """
    k = k * k.shape[-1] ** -0.5
    bias = jnp.einsum("bpthd,hd->bpth", k, query_bias, preferred_element_type=jnp.float32)
    if key_valid is not None:
        bias = jnp.where(key_valid[..., None], bias, -jnp.inf)
    scores = _scores(queries, _merged(jnp.einsum("bpthd,chd->bpthc", k, query_kernel)))
    scores = scores.reshape(*scores.shape[:-1], *bias.shape[2:])  # [B, P, N, T, heads]
    weights = _softmax_over_tokens(scores + bias[:, :, None]).astype(v.dtype)
    v = _merged(jnp.einsum("bpthd,hdc->bpthc", v, out_kernel))
    return weights.reshape(*weights.shape[:3], -1) @ v


@jax.custom_vjp
def _softmax_over_tokens(scores: Float[Array, "b p n t heads"]) -> Float[Array, "b p n t heads"]:
    """Softmax over the axis before the last, whose gradient sums its few tokens one by one.

    XLA:CPU gives a sum to library kernels, which are slow where only the heads lie behind the axis:
    4.4 ms for the gradient of 4096 pixels, 7 tokens and 8 heads. Forwards, where every exponential
    would be computed once more for the sum, they are the faster way.
    """
    return jax.nn.softmax(scores, axis=-2)


def _softmax_forward(scores):
    weights = _softmax_over_tokens(scores)
    return weights, weights


def _softmax_backward(weights, gradient):
    shares = weights * gradient
    total = sum(shares[..., token, :] for token in range(shares.shape[-2]))
    return (shares - weights * total[..., None, :],)


_softmax_over_tokens.defvjp(_softmax_forward, _softmax_backward)


def _scores(
    pixels: Float[Array, "b p2 n c"], tokens: Float[Array, "b p k c"]
) -> Float[Array, "b p n k"]:
    """Pixels come first: with tokens first, XLA:CPU writes a transposed copy of the image.

    And it is `matmul`, which does not repeat pixels of `p2` = 1 for every prompt, as einsum would.
    """
    return jnp.matmul(pixels, tokens.swapaxes(-1, -2), preferred_element_type=jnp.float32)


def _merged(x: Float[Array, "b p t heads c"]) -> Float[Array, "b p t*heads c"]:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
