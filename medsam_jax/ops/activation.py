"""The activation of SAM's networks, and the layer before it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsam_jax.ops.form import AnyMesh, Form
from medsam_jax.ops.kernels import run_kernel


@partial(jax.checkpoint, prevent_cse=False)
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, as in PyTorch; the tanh form differs from it by up to 4.7e-4.

    It is computed in float32, as in PyTorch. The gradient saves only `x`.
    """
    wide = x.astype(jnp.float32)
    normal_cdf = 0.5 * (1.0 + jax.lax.erf(wide * np.float32(np.sqrt(0.5))))
    return (wide * normal_cdf).astype(x.dtype)


def dense_gelu(
    x: Float[Array, "b *n c"], kernel: Float[Array, "c d"], bias: Float[Array, " d"], form: Form
) -> Float[Array, "b *n d"]:
    """Linear layer, then GELU. Plain form: the last line.

    cuBLAS has no exact GELU, so that on NVIDIA GPUs the hidden layer would be written, read and
    written again; a kernel does both in half precision. It has no forward-mode derivative.
    """
    if form.device == "accelerator" and form.kernels and x.dtype.itemsize == 2:
        from medsam_jax.ops import dense_triton

        if dense_triton.fits(kernel):
            return _dense_gelu(form.mesh, x, kernel, bias)
    return gelu(x @ kernel + bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_gelu(mesh: AnyMesh, x: Array, kernel: Array, bias: Array) -> Array:
    from medsam_jax.ops import dense_triton

    def default(x: Array, kernel: Array, bias: Array) -> tuple[Array]:
        return (gelu(x @ kernel + bias),)

    kernels = {"cuda": dense_triton.dense_gelu, "default": default}
    return run_kernel(kernels, mesh, x, shared=(kernel, bias))[0]


def _forward(mesh: AnyMesh, x: Array, kernel: Array, bias: Array):
    from medsam_jax.ops import dense_triton

    def default(x: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
        inner = x @ kernel + bias
        return gelu(inner), inner

    kernels = {"cuda": partial(dense_triton.dense_gelu, with_inner=True), "default": default}
    out, inner = run_kernel(kernels, mesh, x, shared=(kernel, bias))
    return out, (x, kernel, bias, inner)


def _backward(mesh: AnyMesh, saved: tuple[Array, ...], gradient: Array):
    x, kernel, bias, inner = saved
    (by_inner,) = jax.vjp(gelu, inner)[1](gradient)
    return jax.vjp(lambda x, kernel, bias: x @ kernel + bias, x, kernel, bias)[1](by_inner)


_dense_gelu.defvjp(_forward, _backward)
