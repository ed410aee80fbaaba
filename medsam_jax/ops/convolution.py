"""Dense 3x3 convolution whose gradient stays fast inside loops on a CPU.

XLA:CPU hands a convolution in a loop's body to its plain loops unless it is written the way Eigen
takes it: the kernel's gradient of LiteMedSAM's neck then takes 3.1 s in place of 36 ms, the
input's 157 in place of 25. Training on a CPU is such a loop, over images.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.strips import on_cpu


def conv3x3(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Float[Array, "b h w d"]:
    """Convolution of stride 1 with one pixel of zero padding on every side."""
    return _with_loop_gradient(x, kernel) if on_cpu() else _convolution(x, kernel)


def _convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


_with_loop_gradient = jax.custom_vjp(_convolution)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """By x: the convolution with the kernel turned round. By the kernel: a product a position."""
    x, kernel = saved
    height, width = x.shape[1:3]
    by_x = _convolution(gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    by_kernel = [
        jnp.einsum("bhwc,bhwd->cd", padded[:, i : i + height, j : j + width], gradient)
        for i in range(3)
        for j in range(3)
    ]
    return by_x, jnp.stack(by_kernel).reshape(kernel.shape)


_with_loop_gradient.defvjp(_forward, _backward)
