"""Attention within small windows for TPUs, in Pallas: some windows with all heads in each step."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from medsam_jax.ops.kernels import product

_TOKENS = 1568  # of the windows of a step


def forward(
    qkv: Float[Array, "w n heads 3 d"],
    biases: Float[Array, "heads n n"],
    *,
    interpret: bool = False,
) -> Float[Array, "w n heads d"]:
    """Computes `ops.window_attention.window_attention`."""
    windows, tokens, heads, _, head_dim = qkv.shape
    most = max(_TOKENS // tokens, 1)
    at_once = max(n for n in range(1, most + 1) if windows % n == 0)
    out = pl.pallas_call(
        functools.partial(_kernel, head_dim=head_dim),
        grid=(windows // at_once,),
        in_specs=[
            pl.BlockSpec((at_once, tokens, heads * 3 * head_dim), lambda i: (i, 0, 0)),
            pl.BlockSpec(biases.shape, lambda i: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((at_once, tokens, heads * head_dim), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((windows, tokens, heads * head_dim), qkv.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="window_attention",
    )(qkv.reshape(windows, tokens, -1), biases)
    return out.reshape(windows, tokens, heads, head_dim)


def _kernel(qkv_ref, bias_ref, out_ref, *, head_dim: int):
    windows, heads = len(qkv_ref), len(bias_ref)

    def attend_window(window, _):
        qkv = qkv_ref[window]  # [N, heads * 3 * D]
        results = []
        for head in range(heads):
            starts = (head_dim * (3 * head + i) for i in range(3))
            q, k, v = (qkv[:, start : start + head_dim] for start in starts)
            scores = product(q, k, 1, 1) * head_dim**-0.5 + bias_ref[head]
            weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
            total = weights.sum(axis=-1, keepdims=True)
            results.append(product(weights.astype(v.dtype), v, 1, 0) / total)
        out_ref[window] = jnp.concatenate(results, axis=1).astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, windows, attend_window, 0)
