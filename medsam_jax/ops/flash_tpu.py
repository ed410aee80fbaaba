"""Flash attention with decomposed relative positions for TPUs, in Pallas.

Vectors lie along the sublanes and tokens along the lanes, [B, 3, heads, D, N]: head dimensions of
64 or 80 are then not padded to 128 lanes, and sums over keys are sums of registers. A query's
vector is extended by its bias factors, a key's by the one-hot codes of its row and column, so that
a score with its bias is one product. The extension exists in VMEM alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from medsam_jax.ops.kernels import product

_QUERIES = 512  # per step, if that divides their number
_KEYS = 512  # per turn of the loop within a step
_TOKENS = 4096  # of all heads of a step: small windows share a step
_VMEM_BYTES = 48 << 20
_PADDING_SCORE = -3e4  # finite: it is multiplied by the zeros of the codes


def forward(
    qkv: Float[Array, "b n 3 heads d"],
    bias_h: Float[Array, "b n heads y"],
    bias_w: Float[Array, "b n heads x"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n heads d"], Float32[Array, "b heads n"]]:
    """Returns the attention over a grid, and the logarithms of the softmax's sums."""
    vectors, bias, codes = _kernel_inputs(qkv, bias_h, bias_w)
    batch, _, heads, head_dim, length = vectors.shape
    grid, specs = _blocks(vectors.shape, bias.shape[2])
    like = jax.ShapeDtypeStruct
    out, sums = pl.pallas_call(
        _forward_kernel,
        grid=grid,
        in_specs=[specs[name] for name in ("q", "k", "v", "bias", "codes")],
        out_specs=[specs["out"], specs["sums"]],
        out_shape=[
            like((batch, heads, head_dim, length), qkv.dtype),
            like((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=_params("parallel", "parallel", "parallel"),
        interpret=interpret,
        name="grid_attention",
    )(vectors, vectors, vectors, bias, codes)
    return _tokens_second(out, qkv.shape[1]), sums[:, :, 0, : qkv.shape[1]]


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
    vectors, bias, codes = _kernel_inputs(qkv, bias_h, bias_w)
    length = vectors.shape[-1]
    grid, specs = _blocks(vectors.shape, bias.shape[2])
    sums = jnp.pad(sums, ((0, 0), (0, 0), (0, length - sums.shape[2])))[:, :, None]
    names = "q", "k", "v", "bias", "codes", "out", "sums", "out"
    by_key = pltpu.VMEM(specs["k"].block_shape[2:], jnp.float32)
    dqkv, dbias = pl.pallas_call(
        _backward_kernel,
        grid=grid,
        in_specs=[specs[name] for name in names],
        out_specs=[specs["qkv"], specs["bias"]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (vectors, bias)],
        scratch_shapes=[by_key, by_key],
        compiler_params=_params("parallel", "parallel", "arbitrary"),  # keys: sums over queries
        interpret=interpret,
        name="grid_attention_gradient",
    )(
        *(vectors, vectors, vectors, bias, codes),
        *(_tokens_last(out, length), sums, _tokens_last(gradient, length)),
    )
    dqkv, dbias = (_tokens_second(x, qkv.shape[1]) for x in (dqkv, dbias))
    rows, columns = bias_h.shape[-1], bias_w.shape[-1]
    return dqkv, dbias[..., :rows], dbias[..., rows : rows + columns]


def _kernel_inputs(
    qkv: Array, bias_h: Array, bias_w: Array
) -> tuple[Float[Array, "b 3 heads d n"], Float[Array, "b heads r n"], Float[Array, "r n"]]:
    """Returns the vectors, the bias factors of the queries and the codes of the keys.

    A code has one element for each row and column of the grid, and one more for padding.
    """
    tokens, rows, columns = qkv.shape[1], bias_h.shape[-1], bias_w.shape[-1]
    length = tokens if tokens <= _TOKENS // 4 else -(-tokens // 128) * 128
    row, column = np.divmod(np.arange(tokens), columns)
    codes = np.concatenate([np.eye(rows)[:, row], np.eye(columns)[:, column]])
    bias = jnp.concatenate([bias_h, bias_w], axis=-1)
    if length > tokens:
        codes = np.pad(codes, ((0, 1), (0, length - tokens)))
        codes[-1, tokens:] = 1
        bias = jnp.pad(bias, (*[(0, 0)] * 3, (0, 1)), constant_values=_PADDING_SCORE)
    return _tokens_last(qkv, length), _tokens_last(bias, length), jnp.asarray(codes, qkv.dtype)


def _tokens_last(x: Float[Array, "b n ..."], length: int) -> Float[Array, "b ... n2"]:
    return jnp.pad(jnp.moveaxis(x, 1, -1), (*[(0, 0)] * (x.ndim - 1), (0, length - x.shape[1])))


def _tokens_second(x: Float[Array, "b ... n2"], tokens: int) -> Float[Array, "b n ..."]:
    return jnp.moveaxis(x[..., :tokens], -1, 1)


def _blocks(
    shape: tuple[int, ...], factors: int
) -> tuple[tuple[int, int, int], dict[str, pl.BlockSpec]]:
    """Returns the kernels' grid, (items, groups of heads, blocks of queries), and their blocks."""
    batch, _, heads, head_dim, length = shape
    queries = _QUERIES
    while length % queries:
        queries = queries // 2 if queries > 128 else length
    fitting = (n for n in range(1, heads + 1) if heads % n == 0 and n * length <= _TOKENS)
    group = max(fitting, default=1)

    def by_query(*sides: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, group, *sides, queries), lambda b, h, i: (b, h, 0, i))

    def keys(which: int) -> pl.BlockSpec:
        block = None, None, group, head_dim, length
        return pl.BlockSpec(block, lambda b, h, i: (b, which, h, 0, 0))

    specs = {
        "q": pl.BlockSpec((None, None, group, head_dim, queries), lambda b, h, i: (b, 0, h, 0, i)),
        "k": keys(1),
        "v": keys(2),
        "qkv": pl.BlockSpec((None, 3, group, head_dim, length), lambda b, h, i: (b, 0, h, 0, 0)),
        "bias": by_query(factors),
        "codes": pl.BlockSpec((factors, length), lambda b, h, i: (0, 0)),
        "out": by_query(head_dim),
        "sums": by_query(1),
    }
    return (batch, heads // group, length // queries), specs


def _params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES)


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
        q = _extended(q_ref, bias_ref, head)  # [D + R, Q]

        def add_keys(i, carry):
            most, total, out = carry  # [1, Q], [1, Q], [D, Q]
            at = _part(i, count, chunk)
            k = jnp.concatenate([k_ref[head, :, at], codes_ref[:, at]], axis=0)  # [D + R, K]
            scores = product(k, q, 0, 0)  # [K, Q]
            higher = jnp.maximum(most, scores.max(axis=0, keepdims=True))
            weights = jnp.exp(scores - higher)
            shrink = jnp.exp(most - higher)
            total = total * shrink + weights.sum(axis=0, keepdims=True)
            v = v_ref[head, :, at]
            return higher, total, out * shrink + product(v, weights.astype(v.dtype), 1, 0)

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
    dqkv_ref, dbias_ref, dk_sum, dv_sum,
):  # fmt: skip
    heads, head_dim, queries = q_ref.shape
    factors, (count, chunk) = bias_ref.shape[1], _chunks(k_ref.shape[2])
    block, blocks = pl.program_id(2), k_ref.shape[2] // queries

    @pl.when(block == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def attend_head(head, _):
        q = _extended(q_ref, bias_ref, head)
        gradient, sums = gradient_ref[head], sum_ref[head]
        level = out_ref[head].astype(jnp.float32) * gradient.astype(jnp.float32)
        level = level.sum(axis=0, keepdims=True)  # [1, Q]

        def add_keys(i, dq):  # [D + R, Q]
            at = _part(i, count, chunk)
            k = jnp.concatenate([k_ref[head, :, at], codes_ref[:, at]], axis=0)
            weights = jnp.exp(product(k, q, 0, 0) - sums)  # [K, Q]
            by_weight = product(v_ref[head, :, at], gradient, 0, 0)
            by_score = (weights * (by_weight - level)).astype(k.dtype)
            dv_sum[head, :, at] += product(gradient, weights.astype(k.dtype), 1, 1)
            dk_sum[head, :, at] += product(q[:head_dim], by_score, 1, 1)
            return dq + product(k, by_score, 1, 0)

        dq = _loop(count, add_keys, jnp.zeros((head_dim + factors, queries)))
        scaled = dq[:head_dim] * head_dim**-0.5
        dqkv_ref[0, head, :, _part(block, blocks, queries)] = scaled.astype(dqkv_ref.dtype)
        dbias_ref[head] = dq[head_dim:].astype(dbias_ref.dtype)
        return 0

    _loop(heads, attend_head, 0)

    @pl.when(block == blocks - 1)
    def _():
        dqkv_ref[1] = dk_sum[...].astype(dqkv_ref.dtype)
        dqkv_ref[2] = dv_sum[...].astype(dqkv_ref.dtype)


def _extended(q_ref, bias_ref, head) -> Float[Array, "e q"]:
    """Returns a head's queries, scaled, with their bias factors."""
    q = q_ref[head]
    q = (q.astype(jnp.float32) * len(q) ** -0.5).astype(q.dtype)
    return jnp.concatenate([q, bias_ref[head]], axis=0)


def _part(i, count: int, length: int):
    """Returns the i-th of `count` slices of a length."""
    return pl.ds(pl.multiple_of(i * length, length), length) if count > 1 else slice(None)


def _loop(count: int, body, start):
    return body(0, start) if count == 1 else jax.lax.fori_loop(0, count, body, start)
