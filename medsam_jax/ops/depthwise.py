"""Depthwise 3x3 convolution, in the form that each kind of device runs fastest.

XLA's grouped convolution on the CPU visits channel after channel; nine shifted multiply-adds over
all channels vectorise instead. GPUs and TPUs have kernels of their own for it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def depthwise_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 1 c"], stride: int = 1
) -> Float[Array, "b h2 w2 c"]:
    """Depthwise convolution with one pixel of zero padding on every side.

    Output sides are `ceil(side / stride)`, as in PyTorch with `padding=1`.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted_sums(x, kernel, stride),
        default=lambda x, kernel: _grouped_convolution(x, kernel, stride),
    )


def _shifted_sums(x: Array, kernel: Array, stride: int) -> Array:
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = (
        padded[:, row : row + height : stride, column : column + width : stride]
        * kernel[row, column]
        for row in range(3)
        for column in range(3)
    )
    return sum(shifted)


def _grouped_convolution(x: Array, kernel: Array, stride: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
