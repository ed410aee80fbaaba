"""Self-attention within windows of a few tokens, with a bias for each pair of tokens.

The scores of all windows together are several times the feature map. The kernels for TPUs and GPUs
hold those of a window in fast memory: queries, keys and values are read once, and the result is
written once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from medsam_jax.ops.form import AnyMesh, Form
from medsam_jax.ops.kernels import run_kernel

_TPU_TOKENS = 1568  # of the windows of a step
_GPU_TILE = 64  # queries, and keys, at a time
_MASKED = -1e30  # finite, as the difference of two infinities is not a number


def window_attention(
    qkv: Float[Array, "w n heads 3 d"], biases: Float[Array, "heads n n"], form: Form
) -> Float[Array, "w n heads d"]:
    """Softmax attention between the tokens of each window. Plain form: `_attend`.

    The score of a query and a key is `d ** -0.5 * q.k + bias`; the softmax is in float32.
    """
    if form.device != "accelerator" or not form.kernels:
        return _attend(qkv, biases)
    return _in_kernel(form.mesh, qkv, biases)


def _attend(qkv: Array, biases: Array) -> Array:
    q, k, v = (qkv[:, :, :, i].swapaxes(1, 2) for i in range(3))  # [W, heads, N, D]
    q, k = q * q.shape[-1] ** -0.5, k.swapaxes(2, 3)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) + biases
    most = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))  # cancels out
    weights = jnp.exp(scores - most)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v) / total.astype(v.dtype)
    return out.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_kernel(mesh: AnyMesh, qkv: Array, biases: Array) -> Array:
    kernels = {"tpu": on_tpu, "cuda": on_gpu, "default": _attend}
    return run_kernel(kernels, mesh, qkv, shared=(biases,))


def _forward(mesh: AnyMesh, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _in_kernel(mesh, *inputs), inputs


def _backward(mesh: AnyMesh, saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(_attend, *saved)[1](gradient)


_in_kernel.defvjp(_forward, _backward)


def on_tpu(
    qkv: Float[Array, "w n heads 3 d"],
    biases: Float[Array, "heads n n"],
    *,
    interpret: bool = False,
) -> Float[Array, "w n heads d"]:
    """Runs the kernel for TPUs: some windows with all their heads in each step."""
    windows, tokens, heads, _, head_dim = qkv.shape
    most = max(_TPU_TOKENS // tokens, 1)
    at_once = max(n for n in range(1, most + 1) if windows % n == 0)
    out = pl.pallas_call(
        functools.partial(_tpu_kernel, head_dim=head_dim),
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


def _tpu_kernel(qkv_ref, bias_ref, out_ref, *, head_dim: int):
    windows, heads = len(qkv_ref), len(bias_ref)

    def attend_window(window, _):
        qkv = qkv_ref[window]  # [N, heads * 3 * D]
        results = []
        for head in range(heads):
            starts = (head_dim * (3 * head + i) for i in range(3))
            q, k, v = (qkv[:, start : start + head_dim] for start in starts)
            scores = _product(q, k, 1, 1) * head_dim**-0.5 + bias_ref[head]
            weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
            total = weights.sum(axis=-1, keepdims=True)
            results.append(_product(weights.astype(v.dtype), v, 1, 0) / total)
        out_ref[window] = jnp.concatenate(results, axis=1).astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, windows, attend_window, 0)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dimensions = ((axis_a,), (axis_b,)), ((), ())
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def on_gpu(
    qkv: Float[Array, "w n heads 3 d"],
    biases: Float[Array, "heads n n"],
    *,
    interpret: bool = False,
) -> Float[Array, "w n heads d"]:
    """Runs the kernel for GPUs: a tile of queries of one head in each program."""
    windows, tokens, heads, _, head_dim = qkv.shape
    count = pl.cdiv(tokens, _GPU_TILE)
    padded, depth = count * _GPU_TILE, pl.next_power_of_2(head_dim)

    def part(which: int) -> pl.BlockSpec:
        shape = None, padded, None, None, depth
        return pl.BlockSpec(shape, lambda _, head, window: (window, 0, head, which, 0))

    table = pl.BlockSpec((None, padded, padded), lambda _, head, window: (head, 0, 0))
    result = (None, padded, None, depth), lambda _, head, window: (window, 0, head, 0)
    return pl.pallas_call(
        functools.partial(_gpu_kernel, tokens=tokens, head_dim=head_dim, depth=depth),
        grid=(count, heads, windows),
        in_specs=[part(0), part(1), part(2), table],
        out_specs=pl.BlockSpec(*result),
        out_shape=jax.ShapeDtypeStruct((windows, tokens, heads, head_dim), qkv.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="window_attention",
    )(qkv, qkv, qkv, biases)


def _gpu_kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, *, tokens, head_dim, depth):
    tile, size = pl.program_id(0), _GPU_TILE

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
