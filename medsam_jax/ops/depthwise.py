"""Depthwise 3x3 convolution, in the form that each kind of device runs fastest.

XLA's grouped convolution on the CPU visits channel after channel; nine shifted multiply-adds over
all channels vectorise instead (1/28 of the time). GPUs and TPUs have kernels of their own for it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.strips import on_cpu


def depthwise_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 1 c"], stride: int = 1
) -> Float[Array, "b h2 w2 c"]:
    """Depthwise convolution with one pixel of zero padding on every side.

    Output sides are `ceil(side / stride)`, as in PyTorch with `padding=1`.
    """
    if not on_cpu():
        return _grouped_convolution(x, kernel, stride)
    return depthwise_of_strip(jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))), kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_of_strip(
    x: Float[Array, "b rows w c"], kernel: Float[Array, "3 3 1 c"], stride: int = 1
) -> Float[Array, "b h2 w2 c"]:
    """As `depthwise_conv3x3` for rows that come with the ones above and below; the CPU's form.

    Rows are laid end to end, with a zero on each side of a row, so that each of the nine terms is
    one run of memory, and no term leaves all padding out: XLA would take such a term from before
    the padding and compute whatever made it (a GELU) again. Together 0.7 of the time of an inverted
    bottleneck without it. Sums at the ends of rows mix two rows and are dropped.
    """
    batch, height, width, channels = x.shape
    height, row_length = height - 2, width + 2
    terms = _shifted(x, height * row_length)
    kernel = kernel.astype(jnp.float32)  # or XLA:CPU would round after each of the nine terms
    sums = sum(term * kernel[i, j] for (i, j), term in terms.items()).astype(x.dtype)
    return sums.reshape(batch, height, row_length, channels)[:, ::stride, :width:stride]


def _shifted(x: Array, length: int) -> dict[tuple[int, int], Array]:
    """By offset (row, column): runs [b, length, c] of the rows of x laid end to end."""
    batch, _, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, 1), (1, 1), (0, 0))).reshape(batch, -1, channels)
    starts = {(i, j): i * (width + 2) + j for i in range(3) for j in range(3)}
    return {offset: x[:, start : start + length] for offset, start in starts.items()}


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_of_strip(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Shifted sums again; what jax derives, nine padded copies added up, takes 6 times as long."""
    x, kernel = saved
    batch, height, width, channels = x.shape
    height -= 2
    ends = [(side - 1) % stride for side in (height, width)]
    gaps = [(0, 0, 0), (0, ends[0], stride - 1), (0, ends[1], stride - 1), (0, 0, 0)]
    gradient = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), gaps)  # [b, h, w, c]
    around = jnp.pad(gradient, ((0, 0), (2, 2), (0, 0), (0, 0)))
    by_x = depthwise_of_strip(around, kernel[::-1, ::-1])
    rows = jnp.pad(gradient, ((0, 0), (0, 0), (0, 2), (0, 0))).reshape(batch, -1, channels)
    terms = _shifted(x, height * (width + 2))
    by_kernel = jnp.stack([(term * rows).sum(axis=(0, 1)) for term in terms.values()])
    return by_x, by_kernel.reshape(kernel.shape)


depthwise_of_strip.defvjp(_forward, _backward)


def _grouped_convolution(x: Array, kernel: Array, stride: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
