"""Work on a feature map in strips on a CPU, at once elsewhere.

A CPU is fast on what its caches hold and slow on fresh pages: LiteMedSAM's first blocks make 67 MB
of hidden features for an image, which cost more to write and read than to compute. There a loop
takes a strip of rows through all of a block's layers before the next one. Measured on one core, in
strips over whole: inverted bottleneck 0.33, window attention 0.3 to 0.5, MLP 0.4 to 0.7. A GPU or
TPU wants all the work in one kernel instead.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ON_CPU: contextvars.ContextVar[bool | None] = contextvars.ContextVar("on_cpu", default=None)


def on_cpu() -> bool:
    """Whether operations are being traced in the CPU's form; by default, if it is jax's backend."""
    chosen = _ON_CPU.get()
    return jax.default_backend() == "cpu" if chosen is None else chosen


@contextlib.contextmanager
def form_for_cpu(value: bool) -> Iterator[None]:
    """Sets what `on_cpu` answers.

    jax keeps traces by function: give it one that it has not traced before.
    """
    token = _ON_CPU.set(value)
    try:
        yield
    finally:
        _ON_CPU.reset(token)


def rows_of(bytes_: int, width: int, channels: int) -> int:
    """Rows of a float32 map that take no more than so many bytes, for `split_rows`."""
    return bytes_ // (width * channels * 4)


def map_strips(function: Callable[[Any], Array], strips: Any) -> Array:
    """`function` of each strip.

    Gradients on a CPU compute a strip anew instead of keeping what its layers made.

    Args:
      function: from [b, ...] to an array [b, ...] of any shape, of each of the b alone.
      strips: [b, n, ...], or a tree of such arrays.

    Returns:
      The n results, [b, n, ...].
    """
    batch, count = jax.tree.leaves(strips)[0].shape[:2]
    if not on_cpu() or count == 1:
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), strips)
        mapped = function(merged)
        return mapped.reshape(batch, count, *mapped.shape[1:])
    function = jax.checkpoint(function, prevent_cse=False)  # nothing to prevent inside a loop
    if batch == 1:  # XLA copies what is transposed even where the exchanged axis has length 1
        alone = jax.tree.map(lambda x: x[0], strips)
        return jax.lax.map(lambda x: function(jax.tree.map(lambda x: x[None], x))[0], alone)[None]
    return jax.lax.map(function, jax.tree.map(lambda x: x.swapaxes(0, 1), strips)).swapaxes(0, 1)


def map_images(
    function: Callable[[Array], Array], images: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 d"]:
    """`function` of a batch, an image encoder, in the form of the platform it is lowered for.

    Here the platform is chosen, for all that `function` calls. On a CPU images go one by one: a
    batch of 4 together took 1.5 times as long an image, and the memory of 4. Not where a batch is
    spread over several devices, each of which would then compute every image.
    """

    def one_by_one(images: Array) -> Array:
        with form_for_cpu(True):
            if jax.device_count() > 1 or len(images) == 1:
                return function(images)
            return jax.lax.map(lambda image: function(image[None])[0], images)

    def together(images: Array) -> Array:
        with form_for_cpu(False):
            return function(images)

    return jax.lax.platform_dependent(images, cpu=one_by_one, default=together)


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
    """What `split_rows` took apart."""
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
