"""Work on a feature map in parts on a CPU, at once elsewhere.

A CPU is fast on what its caches hold and slow on fresh pages: LiteMedSAM's first blocks make 67 MB
of hidden features for an image, which cost more to write and read than to compute. There a loop
takes a strip of rows through all of a block's layers before the next one. Measured on one core, in
parts over whole: inverted bottleneck 0.39, window attention 0.3 to 0.5, MLP 0.4 to 0.6; a batch of
images one by one, see `map_images`. A GPU or TPU wants all the work in one kernel instead.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def target_platform() -> str:
    """The platform that operations are traced for, "cpu", "gpu" or "tpu": jax's default backend."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Traces the form of another platform, to lower a program for it or to compare the forms.

    jax keeps traces by function: give it one that it has not traced before.
    """
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def map_strips(function: Callable[[Any], Array], strips: Any) -> Array:
    """`function` of each strip.

    Gradients on a CPU compute a strip anew instead of keeping what its layers made.

    Args:
      function: from [b, ...] to an array [b, ...] of any shape, of each of the b alone.
      strips: [b, n, ...], or a tree of such arrays.

    Returns:
      The n results, [b, n, ...].
    """
    if target_platform() != "cpu":
        batch, count = jax.tree.leaves(strips)[0].shape[:2]
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), strips)
        mapped = function(merged)
        return mapped.reshape(batch, count, *mapped.shape[1:])
    function = jax.checkpoint(function, prevent_cse=False)  # nothing to prevent inside a loop
    first = jax.tree.map(lambda x: x.swapaxes(0, 1), strips)
    return jax.lax.map(function, first).swapaxes(0, 1)


def map_images(
    function: Callable[[Array], Array], images: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 d"]:
    """`function` of a batch; on a CPU image after image, which takes the memory of one.

    Not where a batch is spread over devices: each would then compute every image.
    """
    if target_platform() != "cpu" or jax.device_count() > 1 or len(images) == 1:
        return function(images)
    return jax.lax.map(lambda image: function(image[None])[0], images)


def split_rows(x: Float[Array, "b h w c"], most: int) -> Float[Array, "b n r w c"]:
    """Strips of equal height: the largest divisor of the height up to `most` rows, or one row."""
    batch, height, width, channels = x.shape
    rows = max((n for n in range(1, most + 1) if height % n == 0), default=1)
    return x.reshape(batch, height // rows, rows, width, channels)


def join_rows(strips: Float[Array, "b n r w c"]) -> Float[Array, "b h w c"]:
    """What `split_rows` took apart."""
    batch, count, rows, width, channels = strips.shape
    return strips.reshape(batch, count * rows, width, channels)


def with_halo(strips: Float[Array, "b n r w c"]) -> Float[Array, "b n r+2 w c"]:
    """Adds to each strip the row above and the row below it; zeros outside of the image."""
    none, one = (0, 0), (0, 1)
    above = jnp.pad(strips[:, :-1, -1:], (none, one[::-1], none, none, none))
    below = jnp.pad(strips[:, 1:, :1], (none, one, none, none, none))
    return jnp.concatenate([above, strips, below], axis=2)
