"""Attention within small windows for GPUs, in Pallas for Triton: a tile of queries a program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

_TILE = 64  # queries, and keys, at a time
_MASKED = -1e30  # finite, as the difference of two infinities is not a number


def forward(
    qkv: Float[Array, "w n heads 3 d"],
    biases: Float[Array, "heads n n"],
    *,
    interpret: bool = False,
) -> Float[Array, "w n heads d"]:
    """Computes `ops.window_attention.window_attention`."""
    windows, tokens, heads, _, head_dim = qkv.shape
    count = pl.cdiv(tokens, _TILE)
    padded, depth = count * _TILE, pl.next_power_of_2(head_dim)

    def part(which: int) -> pl.BlockSpec:
        shape = None, padded, None, None, depth
        return pl.BlockSpec(shape, lambda _, head, window: (window, 0, head, which, 0))

    table = pl.BlockSpec((None, padded, padded), lambda _, head, window: (head, 0, 0))
    result = (None, padded, None, depth), lambda _, head, window: (window, 0, head, 0)
    return pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, head_dim=head_dim, depth=depth),
        grid=(count, heads, windows),
        in_specs=[part(0), part(1), part(2), table],
        out_specs=pl.BlockSpec(*result),
        out_shape=jax.ShapeDtypeStruct((windows, tokens, heads, head_dim), qkv.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="window_attention",
    )(qkv, qkv, qkv, biases)


def _kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, *, tokens, head_dim, depth):
    tile, size = pl.program_id(0), _TILE

    def inside(first: Any, shape: tuple[int, int], *limits: Any) -> Array:
        """Where the index along each axis, from `first` along the first, is below its limit."""
        row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return (row + first < limits[0]) & (column < limits[1])

    def load(ref: Any, first: Any) -> Array:
        mask = inside(first, (size, depth), tokens, head_dim)
        return plgpu.load(ref.at[pl.ds(first, size), :], mask=mask, other=0.0)

    q = load(q_ref, tile * size)

    def add_keys(i, carry):
        most, total, out = carry  # [Q], [Q], [Q, D]
        first = i * size
        mask = inside(tile * size, (size, size), tokens, tokens - first)
        at = pl.ds(tile * size, size), pl.ds(first, size)
        bias = plgpu.load(bias_ref.at[at], mask=mask, other=_MASKED).astype(jnp.float32)
        scores = plgpu.dot(q, load(k_ref, first), trans_b=True) * head_dim**-0.5 + bias
        higher = jnp.maximum(most, scores.max(axis=1))
        weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(most - higher)
        v = load(v_ref, first)
        out = out * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return higher, total * shrink + weights.sum(axis=1), out

    start = jnp.full(size, _MASKED), jnp.zeros(size), jnp.zeros((size, depth))
    _, total, out = jax.lax.fori_loop(0, pl.cdiv(tokens, size), add_keys, start)
    out = (out / total[:, None]).astype(out_ref.dtype)
    mask = inside(tile * size, (size, depth), tokens, head_dim)
    plgpu.store(out_ref.at[pl.ds(tile * size, size), :], out, mask=mask)
