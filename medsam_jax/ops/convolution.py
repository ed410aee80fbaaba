"""Dense and depthwise 3x3 convolutions, and the inverted bottleneck of TinyViT."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsam_jax.ops.activation import dense_gelu, gelu
from medsam_jax.ops.form import Form
from medsam_jax.ops.strips import join_rows, map_strips, neighbour_rows, rows_of, split_rows

_STRIP_BYTES = 1 << 22  # of a strip's hidden features in an inverted bottleneck


def convolution(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c2 d"], stride: int = 1, groups: int = 1
) -> Float[Array, "b h2 w2 d"]:
    """PyTorch's `Conv2d` with padding `k // 2` and no bias."""
    strides, padding = (stride, stride), [(kernel.shape[0] // 2, kernel.shape[0] // 2)] * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, feature_group_count=groups
    )


def conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], form: Form
) -> Float[Array, "b h w d"]:
    """Dense convolution of stride 1. Plain form: `convolution(x, kernel)`.

    The CPU's form defines its own gradient. Training on a CPU runs in a loop, and in a loop's body
    XLA:CPU uses Eigen only for convolutions of one layout. It runs others as slow scalar loops.
    """
    return _with_loop_gradient(x, kernel) if form.cpu else convolution(x, kernel)


_with_loop_gradient = jax.custom_vjp(convolution, nondiff_argnums=(2, 3))


def _dense_forward(x: Array, kernel: Array, stride: int, groups: int):
    return convolution(x, kernel), (x, kernel)


def _dense_backward(stride: int, groups: int, saved: tuple[Array, Array], gradient: Array):
    # Gradient of x: convolution with the flipped kernel. Gradient of the kernel: one matrix product
    # for each of its 9 positions.
    x, kernel = saved
    height, width = x.shape[1:3]
    by_x = convolution(gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    by_kernel = [
        jnp.einsum("bhwc,bhwd->cd", padded[:, i : i + height, j : j + width], gradient)
        for i in range(3)
        for j in range(3)
    ]
    return by_x, jnp.stack(by_kernel).reshape(kernel.shape)


_with_loop_gradient.defvjp(_dense_forward, _dense_backward)


def depthwise_conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 1 c"], stride: int, form: Form
) -> Float[Array, "b h2 w2 c"]:
    """Depthwise convolution. Plain form: `convolution(x, kernel, stride, groups=c)`.

    The CPU's form adds nine shifted maps, because XLA:CPU processes the groups one by one. So does
    a GPU's program: unlike cuDNN's convolution, the sums are one kernel with what follows them.
    """

    def shifted(x: Array, kernel: Array) -> Array:
        return depthwise_of_strip(jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))), kernel, stride)

    def grouped(x: Array, kernel: Array) -> Array:
        return convolution(x, kernel, stride, x.shape[-1])

    if form.device == "accelerator":
        return jax.lax.platform_dependent(x, kernel, cuda=shifted, default=grouped)
    return shifted(x, kernel) if form.cpu else grouped(x, kernel)


def inverted_bottleneck(
    x: Float[Array, "b h w c"],
    expand: Any,
    mix: Any,
    finish: Callable[[Array, Array], Array],
    form: Form,
) -> Float[Array, "b h2 w2 e"]:
    """Applies `expand`, GELU, `mix`, GELU and `finish`. Plain form: the first line.

    `expand` and `mix` are `models.common.Conv2dBN`, 1x1 and depthwise 3x3; `finish` maps (hidden
    map, x) to the result, each pixel independently. The CPU's form processes a strip of rows at a
    time, because the hidden map has many channels.
    """
    if form.device == "plain":
        return finish(gelu(mix(gelu(expand(x)))), x)
    x = x.astype(expand.dtype or x.dtype)
    (kernel, bias), (mix_kernel, mix_bias) = expand.folded(x.dtype), mix.folded(x.dtype)
    if form.device == "accelerator":
        return finish(gelu(mix(dense_gelu(x, kernel[0, 0], bias, form))), x)
    strips = split_rows(x, rows_of(_STRIP_BYTES, x.shape[2], bias.size))
    count, height = strips.shape[1:3]
    # Rows outside the image are zero before the depthwise convolution, so they get no bias.
    inside = np.ones((count, height + 2), np.float32)
    inside[0, 0] = inside[-1, -1] = 0
    biases = jnp.asarray(inside, x.dtype)[None, ..., None] * bias  # [1, n, r + 2, d]
    biases = jnp.broadcast_to(biases, (len(x), *biases.shape[1:]))

    def strip(inputs: tuple[Array, ...]) -> Array:
        rows, above, below, bias = inputs
        x = jnp.concatenate([above, rows, below], axis=1)
        hidden = gelu(x @ kernel[0, 0] + bias[:, :, None])
        hidden = gelu(depthwise_of_strip(hidden, mix_kernel, mix.stride) + mix_bias)
        return finish(hidden, rows)

    return join_rows(map_strips(strip, (strips, *neighbour_rows(strips), biases)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_of_strip(
    x: Float[Array, "b r w c"], kernel: Float[Array, "3 3 1 c"], stride: int = 1
) -> Float[Array, "b h2 w2 c"]:
    """Depthwise convolution of rows for a CPU; `x` includes the row above and the row below.

    Rows are stored end to end, with a zero on each side of a row. Each of the nine terms is then
    one contiguous slice, and contains some padding. XLA would read a term without padding from
    before the padding, and so compute its source (a GELU) a second time. Sums at the ends of rows
    mix two rows and are dropped.
    """
    batch, height, width, channels = x.shape
    height, row_length = height - 2, width + 2
    terms = _shifted(x, height * row_length)
    # In the type of x, XLA:CPU would round after each of the nine terms.
    kernel = kernel.astype(jnp.float32)
    sums = sum(term * kernel[i, j] for (i, j), term in terms.items()).astype(x.dtype)
    return sums.reshape(batch, height, row_length, channels)[:, ::stride, :width:stride]


def _shifted(x: Array, length: int) -> dict[tuple[int, int], Array]:
    """Returns offset (row, column) -> slice [b, length, c] of the rows of x, stored end to end."""
    batch, _, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, 1), (1, 1), (0, 0))).reshape(batch, -1, channels)
    starts = {(i, j): i * (width + 2) + j for i in range(3) for j in range(3)}
    return {offset: x[:, start : start + length] for offset, start in starts.items()}


def _depthwise_forward(x: Array, kernel: Array, stride: int):
    return depthwise_of_strip(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride: int, saved: tuple[Array, Array], gradient: Array):
    # Shifted sums as in the forward pass. jax's own derivative adds nine padded copies.
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


depthwise_of_strip.defvjp(_depthwise_forward, _depthwise_backward)
