"""Flash attention with decomposed relative positions for TPUs, in Pallas.

Vectors lie along the sublanes and tokens along the lanes, [heads, D, N]: head dimensions of 64 or
80 are then not padded to 128 lanes, and sums over keys are sums of registers. A query's vector is
extended by its bias factors, a key's by the one-hot codes of its row and column, so that a score
with its bias is one product. The extension exists in VMEM alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

_QUERIES = 512  # per step, if that divides their number
_KEYS = 512  # per turn of the loop within a step
_TOKENS = 4096  # of all heads of a step: small windows share a step
_VMEM_BYTES = 48 << 20
_PADDING_SCORE = -3e4  # finite: it is multiplied by the zeros of the codes


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
    shape, inputs = q.shape, _kernel_inputs(q, k, v, bias_h, bias_w)
    q, bias = inputs[0], inputs[3]
    grid, specs = _blocks(q.shape, bias.shape[1])
    out, sums = pl.pallas_call(
        _forward_kernel,
        grid=grid,
        in_specs=[specs["query"], specs["key"], specs["key"], specs["bias"], specs["codes"]],
        out_specs=[specs["query"], specs["sum"]],
        out_shape=[_like(q), jax.ShapeDtypeStruct((len(q), 1, q.shape[2]), jnp.float32)],
        compiler_params=_params("parallel", "parallel"),
        interpret=interpret,
        name="grid_attention",
    )(*inputs)
    return _tokens_first(out, shape), sums.reshape(len(bias_h), -1, sums.shape[-1])


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
    shape, rows = q.shape, q.shape[1]
    inputs = _kernel_inputs(q, k, v, bias_h, bias_w)
    q, bias, length = inputs[0], inputs[3], inputs[0].shape[2]
    grid, specs = _blocks(q.shape, bias.shape[1])
    query, key = specs["query"], specs["key"]
    dq, dk, dv, dbias = pl.pallas_call(
        _backward_kernel,
        grid=grid,
        in_specs=[query, key, key, specs["bias"], specs["codes"], query, specs["sum"], query],
        out_specs=[query, key, key, specs["bias"]],
        out_shape=[_like(q), _like(q), _like(q), _like(bias)],
        scratch_shapes=[pltpu.VMEM((key.block_shape[0], *q.shape[1:]), jnp.float32)] * 2,
        compiler_params=_params("parallel", "arbitrary"),  # k and v sum over blocks of queries
        interpret=interpret,
        name="grid_attention_gradient",
    )(
        *inputs,
        _tokens_last(out, length),
        sums.reshape(-1, 1, length),
        _tokens_last(gradient, length),
    )
    dq, dk, dv = (_tokens_first(x, shape) for x in (dq, dk, dv))
    dbias = _tokens_first(dbias, shape)
    return dq, dk, dv, dbias[..., :rows], dbias[..., rows : rows + shape[2]]


def _kernel_inputs(
    q: Array, k: Array, v: Array, bias_h: Array, bias_w: Array
) -> tuple[Array, Array, Array, Float[Array, "g r n"], Float[Array, "r n"]]:
    """Returns q, k, v [G, D, N], the bias factors of the queries and the codes of the keys.

    A code has one element for each row and column of the grid, and one more for padding.
    """
    _, rows, columns, _, _ = q.shape
    tokens = rows * columns
    length = tokens if tokens <= _TOKENS // 4 else -(-tokens // 128) * 128
    row, column = np.divmod(np.arange(tokens), columns)
    codes = np.concatenate([np.eye(rows)[:, row], np.eye(columns)[:, column]])
    bias = jnp.concatenate([bias_h, bias_w], axis=-1)
    if length > tokens:
        codes = np.pad(codes, ((0, 1), (0, length - tokens)))
        codes[-1, tokens:] = 1
        bias = jnp.pad(bias, (*[(0, 0)] * 4, (0, 1)), constant_values=_PADDING_SCORE)
    q, k, v, bias = (_tokens_last(x, length) for x in (q, k, v, bias))
    return q, k, v, bias, jnp.asarray(codes, q.dtype)


def _tokens_last(x: Float[Array, "b y x heads d"], length: int) -> Float[Array, "g d n"]:
    batch, rows, columns, heads, size = x.shape
    x = x.reshape(batch, rows * columns, heads, size).transpose(0, 2, 3, 1)
    x = x.reshape(batch * heads, size, rows * columns)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])))


def _tokens_first(
    x: Float[Array, "g d n"], shape: tuple[int, ...]
) -> Float[Array, "b y x heads d"]:
    batch, rows, columns, heads, _ = shape
    x = x[:, :, : rows * columns].reshape(batch, heads, -1, rows, columns)
    return x.transpose(0, 3, 4, 1, 2)


def _blocks(
    shape: tuple[int, ...], factors: int
) -> tuple[tuple[int, int], dict[str, pl.BlockSpec]]:
    groups, head_dim, length = shape
    queries = _QUERIES
    while length % queries:
        queries = queries // 2 if queries > 128 else length
    heads = max(
        n for n in range(1, groups + 1) if groups % n == 0 and (n * length <= _TOKENS or n == 1)
    )
    specs = {
        "query": pl.BlockSpec((heads, head_dim, queries), lambda g, i: (g, 0, i)),
        "key": pl.BlockSpec((heads, head_dim, length), lambda g, i: (g, 0, 0)),
        "bias": pl.BlockSpec((heads, factors, queries), lambda g, i: (g, 0, i)),
        "codes": pl.BlockSpec((factors, length), lambda g, i: (0, 0)),
        "sum": pl.BlockSpec((heads, 1, queries), lambda g, i: (g, 0, i)),
    }
    return (groups // heads, length // queries), specs


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Float32[Array, "m n"]:
    dimensions = ((axis_a,), (axis_b,)), ((), ())
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _chunks(length: int) -> tuple[int, int]:
    """Returns the number of chunks of keys and the length of each."""
    chunk = _KEYS
    while length % chunk:
        chunk = chunk // 2 if chunk > 128 else length
    return length // chunk, chunk


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, codes_ref, out_ref, sum_ref):
    heads, head_dim, queries = q_ref.shape
    count, chunk = _chunks(k_ref.shape[2])

    def attend_head(head, _):
        q = jnp.concatenate([q_ref[head], bias_ref[head]], axis=0)  # [D + R, Q]

        def add_keys(i, carry):
            most, total, out = carry  # [1, Q], [1, Q], [D, Q]
            at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk) if count > 1 else slice(None)
            k = jnp.concatenate([k_ref[head, :, at], codes_ref[:, at]], axis=0)  # [D + R, K]
            scores = _dot(k, q, 0, 0)  # [K, Q]
            higher = jnp.maximum(most, scores.max(axis=0, keepdims=True))
            weights = jnp.exp(scores - higher)
            shrink = jnp.exp(most - higher)
            total = total * shrink + weights.sum(axis=0, keepdims=True)
            v = v_ref[head, :, at]
            return higher, total, out * shrink + _dot(v, weights.astype(v.dtype), 1, 0)

        start = (
            jnp.full((1, queries), -jnp.inf),
            jnp.zeros((1, queries)),
            jnp.zeros((head_dim, queries)),
        )
        most, total, out = _loop(count, add_keys, start)
        out_ref[head] = (out / total).astype(out_ref.dtype)
        sum_ref[head] = most + jnp.log(total)
        return 0

    _loop(heads, attend_head, 0)


def _backward_kernel(
    q_ref, k_ref, v_ref, bias_ref, codes_ref, out_ref, sum_ref, gradient_ref,
    dq_ref, dk_ref, dv_ref, dbias_ref, dk_sum, dv_sum,
):  # fmt: skip
    heads, head_dim, queries = q_ref.shape
    factors, (count, chunk) = bias_ref.shape[1], _chunks(k_ref.shape[2])

    @pl.when(pl.program_id(1) == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def attend_head(head, _):
        q = jnp.concatenate([q_ref[head], bias_ref[head]], axis=0)  # [D + R, Q]
        gradient, sums = gradient_ref[head], sum_ref[head]
        level = out_ref[head].astype(jnp.float32) * gradient.astype(jnp.float32)
        level = level.sum(axis=0, keepdims=True)  # [1, Q]

        def add_keys(i, dq):  # [D + R, Q]
            at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk) if count > 1 else slice(None)
            k = jnp.concatenate([k_ref[head, :, at], codes_ref[:, at]], axis=0)
            weights = jnp.exp(_dot(k, q, 0, 0) - sums)  # [K, Q]
            by_weight = _dot(v_ref[head, :, at], gradient, 0, 0)
            by_score = (weights * (by_weight - level)).astype(k.dtype)
            dv_sum[head, :, at] += _dot(gradient, weights.astype(k.dtype), 1, 1)
            dk_sum[head, :, at] += _dot(q[:head_dim], by_score, 1, 1)
            return dq + _dot(k, by_score, 1, 0)

        dq = _loop(count, add_keys, jnp.zeros((head_dim + factors, queries)))
        dq_ref[head] = dq[:head_dim].astype(dq_ref.dtype)
        dbias_ref[head] = dq[head_dim:].astype(dbias_ref.dtype)
        return 0

    _loop(heads, attend_head, 0)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _loop(count: int, body, start):
    return body(0, start) if count == 1 else jax.lax.fori_loop(0, count, body, start)
