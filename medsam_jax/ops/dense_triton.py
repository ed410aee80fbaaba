"""A linear layer with GELU in one kernel for GPUs, in Pallas for Triton."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

_ROWS, _COLUMNS = 128, 128  # of the tiles of the result
_DEPTHS = (64, 32)  # of the tiles of the factors


def fits(kernel: Float[Array, "c d"]) -> bool:
    """Whether tiles divide the layer's sides."""
    return kernel.shape[0] % _DEPTHS[-1] == 0 and kernel.shape[1] % _COLUMNS == 0


def dense_gelu(
    x: Float[Array, "b *n c"],
    kernel: Float[Array, "c d"],
    bias: Float[Array, " d"],
    *,
    with_inner: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "b *n d"], ...]:
    """Returns `gelu(x @ kernel + bias)` and, `with_inner`, the argument of the GELU."""
    rows, (depth, columns) = x.reshape(-1, x.shape[-1]), kernel.shape
    result = jax.ShapeDtypeStruct((len(rows), columns), x.dtype)
    count = 1 + with_inner
    results = pl.pallas_call(
        functools.partial(_kernel, rows=len(rows)),
        grid=(columns // _COLUMNS, pl.cdiv(len(rows), _ROWS)),
        in_specs=[
            pl.BlockSpec((_ROWS, depth), lambda j, i: (i, 0)),
            pl.BlockSpec((depth, _COLUMNS), lambda j, i: (0, j)),
            pl.BlockSpec((_COLUMNS,), lambda j, i: (j,)),
        ],
        out_specs=[pl.BlockSpec((_ROWS, _COLUMNS), lambda j, i: (i, j))] * count,
        out_shape=[result] * count,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="dense_gelu",
    )(rows, kernel, bias)
    return tuple(y.reshape(*x.shape[:-1], columns) for y in results)


def _kernel(x_ref, kernel_ref, bias_ref, *result_refs, rows):
    left, partial = rows - pl.program_id(1) * _ROWS, rows % _ROWS != 0
    depth = next(depth for depth in _DEPTHS if x_ref.shape[1] % depth == 0)

    def inside(columns: int) -> Array | None:
        row = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, columns), 0)
        return row < left if partial else None

    def add(i, total):
        at = pl.ds(i * depth, depth)
        x = plgpu.load(x_ref.at[:, at], mask=inside(depth), other=0.0 if partial else None)
        return total + plgpu.dot(x, plgpu.load(kernel_ref.at[at, :]))

    total = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
    total = jax.lax.fori_loop(0, x_ref.shape[1] // depth, add, total)
    inner = (total + bias_ref[...].astype(jnp.float32)).astype(x_ref.dtype)
    for ref, value in zip(result_refs, (_gelu(inner), inner), strict=False):
        plgpu.store(ref, value, mask=inside(_COLUMNS))


def _gelu(x: Array) -> Array:
    """Exact GELU to 1e-7. Pallas has no `erf` for Triton: Abramowitz and Stegun, 7.1.26."""
    wide = x.astype(jnp.float32)
    argument = jnp.abs(wide) * np.float32(np.sqrt(0.5))
    t = 1.0 / (1.0 + 0.3275911 * argument)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    series = t * (0.254829592 + t * (-0.284496736 + t * series))
    beyond = 0.5 * series * jnp.exp(-argument * argument)  # normal CDF of -|x|
    return (wide * jnp.where(wide < 0, beyond, 1.0 - beyond)).astype(x.dtype)
