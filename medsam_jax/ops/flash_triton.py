"""Flash attention with decomposed relative positions for GPUs, in Pallas for Triton.

A block of queries meets the keys row by row of the grid. Over a row of keys, the first factor of
the bias is one number per query, and the second is the same matrix for every row. The kernels read
and write heads in the layout of the projections around them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

MOST_COLUMNS = 128  # of the grid: a row of keys is one block


def forward(
    q: Float[Array, "b y x heads d"],
    k: Float[Array, "b y x heads d"],
    v: Float[Array, "b y x heads d"],
    bias_h: Float[Array, "b y x heads y"],
    bias_w: Float[Array, "b y x heads x"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b y x heads d"], Float32[Array, "b heads n"]]:
    """Returns the attention over a grid, and the logarithms of the softmax's sums.

    Queries are scaled.
    """
    batch, rows, columns, heads, head_dim = q.shape
    tiles = _Tiles(rows, columns, head_dim, 128 if rows * columns > 1024 else 64)
    by_token = _by_token(q), k, v, _by_token(bias_h), _by_token(bias_w)
    results = by_token[0], jax.ShapeDtypeStruct((batch, heads, rows * columns), jnp.float32)
    grid = tiles.query_blocks, heads, batch
    out, sums = _call(_forward_kernel, grid, by_token, results, tiles, interpret)
    return out.reshape(q.shape), sums


def backward(
    q: Float[Array, "b y x heads d"],
    k: Float[Array, "b y x heads d"],
    v: Float[Array, "b y x heads d"],
    bias_h: Float[Array, "b y x heads y"],
    bias_w: Float[Array, "b y x heads x"],
    out: Float[Array, "b y x heads d"],
    sums: Float32[Array, "b heads n"],
    gradient: Float[Array, "b y x heads d"],
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array, Array]:
    """Returns the gradients of q, k, v, bias_h and bias_w, from that of `out`."""
    batch, rows, columns, heads, head_dim = q.shape
    tiles = _Tiles(rows, columns, head_dim, 64)
    queries, factors, gradient = _by_token(q), (bias_h, bias_w), _by_token(gradient)
    level = jnp.sum(_by_token(out).astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    level = level.swapaxes(1, 2)  # [B, heads, N]
    by_token = queries, k, v, *map(_by_token, factors), sums, level, gradient
    results = queries, *map(_by_token, factors)
    grid = tiles.query_blocks, heads, batch
    by_query = _call(_query_gradient_kernel, grid, by_token, results, tiles, interpret)
    dq, *dfactors = (x.reshape(*k.shape[:4], -1) for x in by_query)
    dk, dv = _call(_key_gradient_kernel, (rows, heads, batch), by_token, (k, v), tiles, interpret)
    return dq, dk, dv, *dfactors


def _by_token(x: Float[Array, "b y x heads d"]) -> Float[Array, "b n heads d"]:
    return x.reshape(len(x), -1, *x.shape[3:])


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Sizes of the grid and of the tiles; the sides of a tile are powers of two."""

    rows: int
    columns: int
    head_dim: int
    block: int  # queries

    @property
    def width(self) -> int:
        return max(16, pl.next_power_of_2(self.columns))

    @property
    def depth(self) -> int:
        return max(16, pl.next_power_of_2(self.head_dim))

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.rows * self.columns, self.block)

    def spec(self, x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        """Returns the part of an operand that belongs to an item and a head, in whole tiles."""
        tokens = self.query_blocks * self.block
        if x.ndim == 3:  # [B, heads, N]
            return pl.BlockSpec((None, None, tokens), lambda _, head, item: (item, head, 0))
        if x.ndim == 5:  # [B, Y, X, heads, D]
            shape = None, self.rows, self.width, None, self.depth
            return pl.BlockSpec(shape, lambda _, head, item: (item, 0, 0, head, 0))
        last = max(16, pl.next_power_of_2(x.shape[-1]))  # [B, N, heads, D], Y or X
        shape = None, tokens, None, last
        return pl.BlockSpec(shape, lambda _, head, item: (item, 0, head, 0))

    def query_tile(self, i: Array, size: int | None) -> tuple[pl.Slice, Array | None]:
        """Returns the slice of the i-th block of queries, and a mask [block, size]."""
        shape = (self.block,) if size is None else (self.block, max(16, pl.next_power_of_2(size)))
        tokens, start = self.rows * self.columns, i * self.block
        partial = tokens % self.block != 0
        return pl.ds(start, self.block), _mask(shape, tokens - start if partial else None, size)

    def load_queries(self, ref: Any, i: Array, size: int | None) -> Array:
        """Returns the i-th block of an operand [N, size], or [N]; zeros beyond."""
        at, mask = self.query_tile(i, size)
        return _load(ref.at[at] if size is None else ref.at[at, :], mask)

    def store_queries(self, ref: Any, i: Array, x: Array, size: int | None) -> None:
        at, mask = self.query_tile(i, size)
        plgpu.store(ref.at[at] if size is None else ref.at[at, :], x.astype(ref.dtype), mask=mask)

    def key_mask(self) -> Array | None:
        return _mask((self.width, self.depth), self.columns, self.head_dim)

    def load_keys(self, ref: Any, row: Array) -> Array:
        """Returns a row of keys or values; zeros beyond."""
        return _load(ref.at[row], self.key_mask())

    def load_column_bias(self, ref: Any, i: Array) -> Float32[Array, "block width"]:
        """Returns the factors by column of the i-th block of queries; -inf beyond the grid."""
        bias = self.load_queries(ref, i, self.columns).astype(jnp.float32)
        if self.width == self.columns:
            return bias
        column = jax.lax.broadcasted_iota(jnp.int32, bias.shape, 1)
        return jnp.where(column < self.columns, bias, -jnp.inf)

    def load_row_bias(self, ref: Any, i: Array, row: Array) -> Float32[Array, "block 1"]:
        at, mask = self.query_tile(i, None)
        return _load(ref.at[at, row], mask).astype(jnp.float32)[:, None]


def _mask(shape: tuple[int, ...], *limits: Any) -> Array | None:
    """Returns where the index along each axis is below its limit; None: everywhere."""
    mask = None
    for axis, limit in enumerate(limits[: len(shape)]):
        if limit is None or (isinstance(limit, int) and limit == shape[axis]):
            continue
        inside = jax.lax.broadcasted_iota(jnp.int32, shape, axis) < limit
        mask = inside if mask is None else mask & inside
    return mask


def _load(ref: Any, mask: Array | None) -> Array:
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0.0)


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, int, int],
    operands: Sequence[Array],
    results: Sequence[Array | jax.ShapeDtypeStruct],
    tiles: _Tiles,
    interpret: bool,
) -> tuple[Array, ...]:
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles),
        grid=grid,
        in_specs=[tiles.spec(x) for x in operands],
        out_specs=[tiles.spec(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=plgpu.CompilerParams(num_warps=4 if tiles.depth <= 64 else 8, num_stages=2),
        interpret=interpret,
        name="grid_attention" + kernel.__name__.removesuffix("_kernel"),
    )(*operands)


def _forward_kernel(q_ref, k_ref, v_ref, bias_h_ref, bias_w_ref, out_ref, sum_ref, *, tiles):
    i = pl.program_id(0)
    q = tiles.load_queries(q_ref, i, tiles.head_dim)
    bias_w = tiles.load_column_bias(bias_w_ref, i)

    def add_row(row, carry):
        most, total, out = carry  # [Q], [Q], [Q, D]
        scores = plgpu.dot(q, tiles.load_keys(k_ref, row), trans_b=True)
        scores += tiles.load_row_bias(bias_h_ref, i, row) + bias_w  # [Q, X]
        higher = jnp.maximum(most, scores.max(axis=1))
        weights = jnp.exp(scores - higher[:, None])
        shrink = jnp.exp(most - higher)
        v = tiles.load_keys(v_ref, row)
        out = out * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return higher, total * shrink + weights.sum(axis=1), out

    start = jnp.full(tiles.block, -jnp.inf), jnp.zeros(tiles.block), jnp.zeros(q.shape)
    most, total, out = jax.lax.fori_loop(0, tiles.rows, add_row, start)
    tiles.store_queries(out_ref, i, out / total[:, None], tiles.head_dim)
    tiles.store_queries(sum_ref, i, most + jnp.log(total), None)


def _query_gradient_kernel(
    q_ref, k_ref, v_ref, bias_h_ref, bias_w_ref, sum_ref, level_ref, gradient_ref,
    dq_ref, dbias_h_ref, dbias_w_ref, *, tiles,
):  # fmt: skip
    i = pl.program_id(0)
    q = tiles.load_queries(q_ref, i, tiles.head_dim)
    gradient = tiles.load_queries(gradient_ref, i, tiles.head_dim)
    bias_w = tiles.load_column_bias(bias_w_ref, i)
    bias_w -= tiles.load_queries(sum_ref, i, None)[:, None]
    level = tiles.load_queries(level_ref, i, None)[:, None]
    at, mask = tiles.query_tile(i, None)

    def add_row(row, carry):
        dq, dbias_w = carry
        k = tiles.load_keys(k_ref, row)
        scores = plgpu.dot(q, k, trans_b=True)
        weights = jnp.exp(scores + tiles.load_row_bias(bias_h_ref, i, row) + bias_w)
        by_weight = plgpu.dot(gradient, tiles.load_keys(v_ref, row), trans_b=True)
        by_score = weights * (by_weight - level)  # [Q, X]
        row_sum = by_score.sum(axis=1).astype(dbias_h_ref.dtype)
        plgpu.store(dbias_h_ref.at[at, row], row_sum, mask=mask)
        return dq + plgpu.dot(by_score.astype(k.dtype), k), dbias_w + by_score

    start = jnp.zeros(q.shape), jnp.zeros(bias_w.shape)
    dq, dbias_w = jax.lax.fori_loop(0, tiles.rows, add_row, start)
    tiles.store_queries(dq_ref, i, dq, tiles.head_dim)
    tiles.store_queries(dbias_w_ref, i, dbias_w, tiles.columns)


def _key_gradient_kernel(
    q_ref, k_ref, v_ref, bias_h_ref, bias_w_ref, sum_ref, level_ref, gradient_ref,
    dk_ref, dv_ref, *, tiles,
):  # fmt: skip
    row = pl.program_id(0)
    k, v = tiles.load_keys(k_ref, row), tiles.load_keys(v_ref, row)

    def add_queries(i, carry):
        dk, dv = carry
        q = tiles.load_queries(q_ref, i, tiles.head_dim)
        gradient = tiles.load_queries(gradient_ref, i, tiles.head_dim)
        bias = tiles.load_row_bias(bias_h_ref, i, row) + tiles.load_column_bias(bias_w_ref, i)
        bias -= tiles.load_queries(sum_ref, i, None)[:, None]
        weights = jnp.exp(plgpu.dot(q, k, trans_b=True) + bias)  # [Q, X]
        by_weight = plgpu.dot(gradient, v, trans_b=True)
        by_score = weights * (by_weight - tiles.load_queries(level_ref, i, None)[:, None])
        dv += plgpu.dot(weights.astype(v.dtype), gradient, trans_a=True)
        return dk + plgpu.dot(by_score.astype(q.dtype), q, trans_a=True), dv

    start = jnp.zeros(k.shape), jnp.zeros(v.shape)
    dk, dv = jax.lax.fori_loop(0, tiles.query_blocks, add_queries, start)
    plgpu.store(dk_ref.at[row], dk.astype(dk_ref.dtype), mask=tiles.key_mask())
    plgpu.store(dv_ref.at[row], dv.astype(dv_ref.dtype), mask=tiles.key_mask())
