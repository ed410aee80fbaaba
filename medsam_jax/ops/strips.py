"""Applies layers to a feature map strip by strip on a CPU, all at once elsewhere.

A CPU is fast on data in its caches and slow on newly allocated pages. A loop therefore applies all
layers of a block to one strip of rows before the next strip. GPUs and TPUs are faster with all the
work in one kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.form import Form

_TOKENS = 1024  # per strip in `token_wise`


def image_by_image(
    encoder: Callable[[Array], Array], images: Float[Array, "b h w c"], form: Form
) -> Float[Array, "b h2 w2 d"]:
    """Applies an image encoder to a batch. Plain form: `encoder(images)`."""
    if not form.image_by_image or len(images) == 1:
        return encoder(images)
    return jax.lax.map(lambda image: encoder(image[None])[0], images)


def token_wise(
    layer: Callable[[Array], Array], x: Float[Array, "b h w c"], form: Form
) -> Float[Array, "b h w d"]:
    """Applies a layer that processes each token independently. Plain form: `layer(x)`."""
    if not form.cpu:
        return layer(x)

    def flat(rows: Float[Array, "b r w c"]) -> Float[Array, "b r w d"]:
        # A list of tokens: the gradient of a kernel over more axes is slower on a CPU.
        return layer(rows.reshape(-1, rows.shape[-1])).reshape(*rows.shape[:3], -1)

    return join_rows(map_strips(flat, split_rows(x, max(_TOKENS // x.shape[2], 1))))


def map_strips(function: Callable[[Any], Array], strips: Any) -> Array:
    """Applies a function to one strip after another; gradients recompute each strip.

    `function` maps [b, ...] to an array [b, ...] of any shape, each batch item independently.
    `strips` are [b, n, ...], or a tree of such arrays. The result is [b, n, ...].
    """
    batch, count = jax.tree.leaves(strips)[0].shape[:2]
    if count == 1:
        return function(jax.tree.map(lambda x: x[:, 0], strips))[:, None]
    function = jax.checkpoint(function, prevent_cse=False)  # CSE does not cross the loop
    if batch == 1:  # XLA would copy even for a transpose of an axis of length 1
        alone = jax.tree.map(lambda x: x[0], strips)
        return jax.lax.map(lambda x: function(jax.tree.map(lambda x: x[None], x))[0], alone)[None]
    return jax.lax.map(function, jax.tree.map(lambda x: x.swapaxes(0, 1), strips)).swapaxes(0, 1)


def rows_of(bytes_: int, width: int, channels: int) -> int:
    """Returns the number of rows of a float32 map that fit `bytes_`, for `split_rows`."""
    return bytes_ // (width * channels * 4)


def split_rows(
    x: Float[Array, "b h w c"], most: int, multiple: int = 1
) -> Float[Array, "b n r w c"]:
    """Splits a map into strips of equal height: the largest divisor of its height up to `most`.

    It is a multiple, at least once, of `multiple`, which must divide the height.
    """
    batch, height, width, channels = x.shape
    fitting = (n for n in range(multiple, most + 1, multiple) if height % n == 0)
    rows = max(fitting, default=multiple)
    return x.reshape(batch, height // rows, rows, width, channels)


def join_rows(strips: Float[Array, "b n r w c"]) -> Float[Array, "b h w c"]:
    """Joins the strips of `split_rows` to a map."""
    batch, count, rows, width, channels = strips.shape
    return strips.reshape(batch, count * rows, width, channels)


def neighbour_rows(
    strips: Float[Array, "b n r w c"],
) -> tuple[Float[Array, "b n 1 w c"], Float[Array, "b n 1 w c"]]:
    """Returns the row above and the row below each strip; zeros outside the image."""
    above = jnp.pad(strips[:, :-1, -1:], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    below = jnp.pad(strips[:, 1:, :1], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    return above, below
