"""Layers applied to a feature map piece by piece, for a CPU; all at once elsewhere.

A CPU is fast on what its caches hold and slow on fresh pages, so a loop takes a strip of rows
through all of a block's layers before the next one. A GPU or TPU wants all the work in one kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.form import Form

_TOKENS = 1024  # of a strip of `token_wise`


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
    """Applies a layer that treats every token alike. Plain form: `layer(x)`."""
    if not form.cpu:
        return layer(x)
    return join_rows(map_strips(layer, split_rows(x, max(_TOKENS // x.shape[2], 1))))


def map_strips(function: Callable[[Any], Array], strips: Any) -> Array:
    """Applies a function to one strip after another; gradients compute a strip again.

    Args:
      function: from [b, ...] to an array [b, ...] of any shape, for each of the b alone.
      strips: [b, n, ...], or a tree of such arrays.

    Returns:
      The n results, [b, n, ...].
    """
    batch, count = jax.tree.leaves(strips)[0].shape[:2]
    if count == 1:
        return function(jax.tree.map(lambda x: x[:, 0], strips))[:, None]
    function = jax.checkpoint(function, prevent_cse=False)  # nothing to prevent inside a loop
    if batch == 1:  # XLA copies what is transposed even where the exchanged axis has length 1
        alone = jax.tree.map(lambda x: x[0], strips)
        return jax.lax.map(lambda x: function(jax.tree.map(lambda x: x[None], x))[0], alone)[None]
    return jax.lax.map(function, jax.tree.map(lambda x: x.swapaxes(0, 1), strips)).swapaxes(0, 1)


def rows_of(bytes_: int, width: int, channels: int) -> int:
    """Rows of a float32 map that take no more than so many bytes, for `split_rows`."""
    return bytes_ // (width * channels * 4)


def split_rows(
    x: Float[Array, "b h w c"], most: int, multiple: int = 1
) -> Float[Array, "b n r w c"]:
    """Strips of equal height: the largest divisor of the height up to `most` rows.

    Args:
      most: rows of a strip; fewer than `multiple` count as `multiple`.
      multiple: what the rows of a strip are a multiple of, as the height is.
    """
    batch, height, width, channels = x.shape
    fitting = (n for n in range(multiple, most + 1, multiple) if height % n == 0)
    rows = max(fitting, default=multiple)
    return x.reshape(batch, height // rows, rows, width, channels)


def join_rows(strips: Float[Array, "b n r w c"]) -> Float[Array, "b h w c"]:
    """The map that `split_rows` took apart."""
    batch, count, rows, width, channels = strips.shape
    return strips.reshape(batch, count * rows, width, channels)


def neighbour_rows(
    strips: Float[Array, "b n r w c"],
) -> tuple[Float[Array, "b n 1 w c"], Float[Array, "b n 1 w c"]]:
    """The row above and the row below each strip; zeros outside of the image."""
    none, one = (0, 0), (0, 1)
    above = jnp.pad(strips[:, :-1, -1:], (none, one[::-1], none, none, none))
    below = jnp.pad(strips[:, 1:, :1], (none, one, none, none, none))
    return above, below
