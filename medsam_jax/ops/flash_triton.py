"""Flash attention with decomposed relative positions for GPUs, in Pallas for Triton.

A block of queries meets the keys row by row of the grid. Over a row of keys, the first factor of
the bias is one number per query, and the second is the same matrix for every row. The kernels read
queries, keys and values, and write their gradients, where the projection has them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

_Q, _K, _V = np.arange(3, dtype=np.int32)  # places in `qkv`
_Operand = tuple[Array | jax.ShapeDtypeStruct, pl.BlockSpec]


def position_bias(
    qkv: Float[Array, "b n 3 heads d"],
    rel_h: Float[Array, "y y d"],
    rel_w: Float[Array, "x x d"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n heads y"], Float[Array, "b n heads x"]]:
    """Computes `ops.attention.position_bias` without transposed copies of the queries."""
    sizes = _Sizes(len(rel_h), len(rel_w), qkv.shape[-1], block=64)

    def along(axis: int, rel: Array) -> Array:
        side, last = len(rel), _padded(len(rel))
        shape = len(qkv), sizes.rows, sizes.columns, qkv.shape[3], side
        bias = jax.ShapeDtypeStruct(shape, qkv.dtype)
        table = pl.BlockSpec((side, last, sizes.depth), lambda *_: (0, 0, 0))
        result = bias, _block(sizes.height, sizes.width, "head", last)
        kernel = functools.partial(_bias_kernel, axis=axis)
        operands = [sizes.on_grid(qkv), (rel, table)]
        [bias] = _call(kernel, sizes, side, operands, [result], interpret)
        return bias.reshape(*qkv.shape[:2], *shape[3:])

    return along(0, rel_h), along(1, rel_w)


def forward(
    qkv: Float[Array, "b n 3 heads d"],
    bias_h: Float[Array, "b n heads y"],
    bias_w: Float[Array, "b n heads x"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n heads d"], Float32[Array, "b heads n"]]:
    """Returns the attention over a grid, and the logarithms of the softmax's sums."""
    batch, tokens, _, heads, head_dim = qkv.shape
    block = 128 if tokens > 1024 else 64
    sizes = _Sizes(bias_h.shape[-1], bias_w.shape[-1], head_dim, block)
    operands = [sizes.by_token(x) for x in (qkv, bias_h, bias_w)]
    out = jax.ShapeDtypeStruct((batch, tokens, heads, head_dim), qkv.dtype)
    sums = jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)
    results = [sizes.by_token(out), sizes.of_sums(sums)]
    return _call(_forward_kernel, sizes, sizes.blocks, operands, results, interpret)


def backward(
    qkv: Float[Array, "b n 3 heads d"],
    bias_h: Float[Array, "b n heads y"],
    bias_w: Float[Array, "b n heads x"],
    out: Float[Array, "b n heads d"],
    sums: Float32[Array, "b heads n"],
    gradient: Float[Array, "b n heads d"],
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Returns the gradients of qkv, bias_h and bias_w, from that of `out`."""
    sizes = _Sizes(bias_h.shape[-1], bias_w.shape[-1], qkv.shape[-1], block=64)
    level = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    operands = [sizes.by_token(x) for x in (qkv, bias_h, bias_w)]
    operands += [sizes.of_sums(sums), sizes.of_sums(level.swapaxes(1, 2)), sizes.by_token(gradient)]
    results = [sizes.by_token(x) for x in (qkv, bias_h, bias_w)]
    dqkv, *dbias = _call(_query_gradient_kernel, sizes, sizes.blocks, operands, results, interpret)
    operands.append(sizes.by_token(dqkv))  # keys and values are added to it
    [dqkv] = _call(_key_gradient_kernel, sizes, sizes.rows, operands, results[:1], interpret, True)
    return dqkv, *dbias


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of the grid and of the tiles that programs load: powers of two, 16 at least."""

    rows: int
    columns: int
    head_dim: int
    block: int  # queries of a tile

    @property
    def height(self) -> int:
        return _padded(self.rows)

    @property
    def width(self) -> int:
        return _padded(self.columns)

    @property
    def depth(self) -> int:
        return _padded(self.head_dim)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.rows * self.columns, self.block)

    def by_token(self, x: Array | jax.ShapeDtypeStruct) -> _Operand:
        """Operand [B, N, heads, D] or [B, N, 3, heads, D], all tokens of a head."""
        last_row = (self.rows - 1) * self.columns
        tokens = max(self.blocks * self.block, last_row + self.width)
        return x, _block(tokens, *x.shape[2:-2], "head", _padded(x.shape[-1]))

    def of_sums(self, x: Array | jax.ShapeDtypeStruct) -> _Operand:
        """Operand [B, heads, N]."""
        return x, _block("head", self.blocks * self.block)

    def on_grid(self, qkv: Array) -> _Operand:
        """Operand [B, N, 3, heads, D] by row and column."""
        qkv = qkv.reshape(len(qkv), self.rows, self.columns, *qkv.shape[2:])
        return qkv, _block(self.height, self.width, 3, "head", self.depth)

    def queries(self, i: Any, *inner: Any, size: int | None = None) -> "_Tile":
        """The i-th block of queries of an operand by token; a vector of `size` for each, or one
        number at `inner`."""
        tokens, start = self.rows * self.columns, i * self.block
        left = None if tokens % self.block == 0 else tokens - start
        at = pl.ds(start, self.block), *inner
        if size is None:
            return _tile(at, (self.block, left))
        return _tile((*at, slice(None)), (self.block, left), (_padded(size), size))

    def keys(self, row: Any, which: Any) -> "_Tile":
        """A row of the grid of keys or values of an operand by token."""
        at = pl.ds(row * self.columns, self.width), which, slice(None)
        return _tile(at, (self.width, self.columns), (self.depth, self.head_dim))


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Part of an operand, with a mask if it reaches over the edge."""

    at: tuple[Any, ...]
    mask: Any

    def load(self, ref: Any) -> Array:
        """Returns the values; zeros beyond the edge."""
        other = None if self.mask is None else 0.0
        return plgpu.load(ref.at[self.at], mask=self.mask, other=other)

    def store(self, ref: Any, x: Array) -> None:
        plgpu.store(ref.at[self.at], x.astype(ref.dtype), mask=self.mask)


def _tile(at: tuple[Any, ...], *sides: tuple[int, Any]) -> _Tile:
    """`sides`: length of the tile and number of valid entries, or None for all, by axis."""
    shape, mask = tuple(length for length, _ in sides), None
    for axis, (length, valid) in enumerate(sides):
        if valid is None or (isinstance(valid, int) and valid == length):
            continue
        inside = jax.lax.broadcasted_iota(jnp.int32, shape, axis) < valid
        mask = inside if mask is None else mask & inside
    return _Tile(at, mask)


def _padded(length: int) -> int:
    return max(16, pl.next_power_of_2(length))


def _block(*sides: int | str) -> pl.BlockSpec:
    """Part of an operand that belongs to an item and a head: the axes after the item's."""
    shape = None, *(None if side == "head" else side for side in sides)
    at = [side == "head" for side in sides]
    return pl.BlockSpec(shape, lambda _, head, item: (item, *(head * one for one in at)))


def _call(
    kernel: Callable[..., None],
    sizes: _Sizes,
    programs: int,
    operands: list[_Operand],
    results: list[_Operand],
    interpret: bool,
    last_becomes_result: bool = False,
) -> tuple[Array, ...]:
    """Runs `programs` programs for each head of each item."""
    batch, heads = len(operands[0][0]), operands[0][0].shape[-2]
    name = getattr(kernel, "func", kernel).__name__.strip("_").removesuffix("_kernel")
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes),
        grid=(programs, heads, batch),
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in results],
        input_output_aliases={len(operands) - 1: 0} if last_becomes_result else {},
        compiler_params=plgpu.CompilerParams(num_warps=4 if sizes.depth <= 64 else 8, num_stages=2),
        interpret=interpret,
        name=f"grid_attention_{name}",
    )(*(x for x, _ in operands))


def _bias_kernel(qkv_ref, rel_ref, bias_ref, *, axis, sizes):
    """Multiplies a row of queries, or a column (axis 1), with the vectors of its position."""
    i = pl.program_id(0)
    length, valid = [(sizes.width, sizes.columns), (sizes.height, sizes.rows)][axis]
    side = rel_ref.shape[0]

    def along(*inner: Any, size: int) -> _Tile:
        at = (i, slice(None)) if axis == 0 else (slice(None), i)
        return _tile((*at, *inner, slice(None)), (length, valid), (_padded(size), size))

    q = along(_Q, size=sizes.head_dim).load(qkv_ref)
    at = i, slice(None), slice(None)
    rel = _tile(at, (_padded(side), side), (sizes.depth, sizes.head_dim)).load(rel_ref)
    along(size=side).store(bias_ref, plgpu.dot(q, rel, trans_b=True))


def _column_bias(ref: Any, i: Any, sizes: _Sizes) -> Float32[Array, "block width"]:
    """Returns the factors by column of a block of queries; -inf beyond the grid."""
    bias = sizes.queries(i, size=sizes.columns).load(ref).astype(jnp.float32)
    if sizes.width == sizes.columns:
        return bias
    column = jax.lax.broadcasted_iota(jnp.int32, bias.shape, 1)
    return jnp.where(column < sizes.columns, bias, -jnp.inf)


def _row_bias(ref: Any, i: Any, row: Any, sizes: _Sizes) -> Float32[Array, "block 1"]:
    return sizes.queries(i, row).load(ref).astype(jnp.float32)[:, None]


def _forward_kernel(qkv_ref, bias_h_ref, bias_w_ref, out_ref, sum_ref, *, sizes):
    i, scale = pl.program_id(0), sizes.head_dim**-0.5
    q = sizes.queries(i, _Q, size=sizes.head_dim).load(qkv_ref)
    bias_w = _column_bias(bias_w_ref, i, sizes)

    def add_row(row, carry):
        most, total, out = carry  # [Q], [Q], [Q, D]
        scores = plgpu.dot(q, sizes.keys(row, _K).load(qkv_ref), trans_b=True) * scale
        scores += _row_bias(bias_h_ref, i, row, sizes) + bias_w  # [Q, X]
        higher = jnp.maximum(most, scores.max(axis=1))
        weights = jnp.exp(scores - higher[:, None])
        shrink = jnp.exp(most - higher)
        v = sizes.keys(row, _V).load(qkv_ref)
        out = out * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return higher, total * shrink + weights.sum(axis=1), out

    start = jnp.full(sizes.block, -jnp.inf), jnp.zeros(sizes.block), jnp.zeros(q.shape)
    most, total, out = jax.lax.fori_loop(0, sizes.rows, add_row, start)
    sizes.queries(i, size=sizes.head_dim).store(out_ref, out / total[:, None])
    sizes.queries(i).store(sum_ref, most + jnp.log(total))


def _query_gradient_kernel(
    qkv_ref, bias_h_ref, bias_w_ref, sum_ref, level_ref, gradient_ref,
    dqkv_ref, dbias_h_ref, dbias_w_ref, *, sizes,
):  # fmt: skip
    i, scale = pl.program_id(0), sizes.head_dim**-0.5
    q = sizes.queries(i, _Q, size=sizes.head_dim).load(qkv_ref)
    gradient = sizes.queries(i, size=sizes.head_dim).load(gradient_ref)
    level = sizes.queries(i).load(level_ref)[:, None]
    bias_w = _column_bias(bias_w_ref, i, sizes) - sizes.queries(i).load(sum_ref)[:, None]

    def add_row(row, carry):
        dq, dbias_w = carry
        k = sizes.keys(row, _K).load(qkv_ref)
        scores = plgpu.dot(q, k, trans_b=True) * scale
        weights = jnp.exp(scores + _row_bias(bias_h_ref, i, row, sizes) + bias_w)
        by_weight = plgpu.dot(gradient, sizes.keys(row, _V).load(qkv_ref), trans_b=True)
        by_score = weights * (by_weight - level)  # [Q, X]
        sizes.queries(i, row).store(dbias_h_ref, by_score.sum(axis=1))
        return dq + plgpu.dot(by_score.astype(k.dtype), k), dbias_w + by_score

    start = jnp.zeros(q.shape), jnp.zeros(bias_w.shape)
    dq, dbias_w = jax.lax.fori_loop(0, sizes.rows, add_row, start)
    sizes.queries(i, _Q, size=sizes.head_dim).store(dqkv_ref, dq * scale)
    sizes.queries(i, size=sizes.columns).store(dbias_w_ref, dbias_w)


def _key_gradient_kernel(
    qkv_ref, bias_h_ref, bias_w_ref, sum_ref, level_ref, gradient_ref, _,
    dqkv_ref, *, sizes,
):  # fmt: skip
    row, scale = pl.program_id(0), sizes.head_dim**-0.5
    k, v = (sizes.keys(row, which).load(qkv_ref) for which in (_K, _V))

    def add_queries(i, carry):
        dk, dv = carry
        q = sizes.queries(i, _Q, size=sizes.head_dim).load(qkv_ref)
        gradient = sizes.queries(i, size=sizes.head_dim).load(gradient_ref)
        level = sizes.queries(i).load(level_ref)[:, None]
        bias = _row_bias(bias_h_ref, i, row, sizes) + _column_bias(bias_w_ref, i, sizes)
        bias -= sizes.queries(i).load(sum_ref)[:, None]
        weights = jnp.exp(plgpu.dot(q, k, trans_b=True) * scale + bias)  # [Q, X]
        by_weight = plgpu.dot(gradient, v, trans_b=True)
        by_score = weights * (by_weight - level)
        dv += plgpu.dot(weights.astype(v.dtype), gradient, trans_a=True)
        return dk + plgpu.dot(by_score.astype(q.dtype), q, trans_a=True), dv

    start = jnp.zeros(k.shape), jnp.zeros(v.shape)
    dk, dv = jax.lax.fori_loop(0, sizes.blocks, add_queries, start)
    sizes.keys(row, _K).store(dqkv_ref, dk * scale)
    sizes.keys(row, _V).store(dqkv_ref, dv)
