"""Self-attention within windows of a map that need not be a multiple of the window.

PyTorch fills the map up with zeros: at 64 x 64 tokens and windows of 7 or 14, a sixth of all tokens
are none. Here nothing is computed for those beyond the map's right edge; how their keys are to be
counted is the attention's affair, as every one of them is the same.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsam_jax.ops.strips import join_rows, map_strips, rows_of, split_rows


def map_window_rows(
    function: Callable[[Array], Array], x: Float[Array, "b h w c"], size: int, most_bytes: int
) -> Float[Array, "b h w d"]:
    """`function` of rows of windows: on a CPU as many at a time as `most_bytes` of x hold.

    At the bottom the map is filled up with zeros. To leave those rows out as well takes a program
    of its own for them: LiteMedSAM's encoder then takes 0.97 of the time, and half as long again to
    compile, with 150 MB more.

    Args:
      function: of [b, n * size, w, c].
      size: of a window, tokens a side.
    """
    height = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, 0), (0, 0)))
    strips = split_rows(x, rows_of(most_bytes, *x.shape[2:]), multiple=size)
    return join_rows(map_strips(function, strips))[:, :height]


def attend_in_windows(
    x: Float[Array, "b h w c"],
    size: int,
    project_in: Callable[[Array], Array],
    attend: Callable[[Array, int], Array],
    project_out: Callable[[Array], Array],
) -> Float[Array, "b h w d"]:
    """Attention of what `map_window_rows` hands on.

    Args:
      x: the map, normed.
      size: of a window, tokens a side.
      project_in: tokens [t, c] to their queries, keys and values, [t, e].
      attend: what windows have on the map, and how many columns that is, [n, size * columns, e] to
        [n, size * columns, d].
      project_out: tokens [t, d] to tokens.
    """
    width = x.shape[2]
    whole = width - width % size
    parts = [(x[:, :, :whole], size), (x[:, :, whole:], width - whole)]
    parts = [(part, columns) for part, columns in parts if part.size]
    # All tokens in one product each way: the right edge alone would be too few.
    tokens = [_partition(part, (size, columns)) for part, columns in parts]
    sections = np.cumsum([len(of_part) for of_part in tokens])[:-1]
    tokens = jnp.split(project_in(jnp.concatenate(tokens)), sections)
    tokens = [
        attend(of_part.reshape(-1, size * columns, of_part.shape[-1]), columns)
        for of_part, (_, columns) in zip(tokens, parts, strict=True)
    ]
    tokens = [of_part.reshape(-1, of_part.shape[-1]) for of_part in tokens]
    tokens = jnp.split(project_out(jnp.concatenate(tokens)), sections)
    parts = [
        _reverse(of_part, part.shape, (size, columns))
        for of_part, (part, columns) in zip(tokens, parts, strict=True)
    ]
    return jnp.concatenate(parts, axis=2)


def _partition(x: Float[Array, "b h w c"], window: tuple[int, int]) -> Float[Array, "t c"]:
    """The tokens of a map, whose sides are multiples of the window's, window by window."""
    (batch, height, width, dim), (rows, columns) = x.shape, window
    x = x.reshape(batch, height // rows, rows, width // columns, columns, dim)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, dim)


def _reverse(
    tokens: Float[Array, "t d"], shape: tuple[int, int, int, int], window: tuple[int, int]
) -> Float[Array, "b h w d"]:
    """Puts tokens back into the map of `shape` that they were cut from."""
    (batch, height, width, _), (rows, columns) = shape, window
    x = tokens.reshape(batch, height // rows, width // columns, rows, columns, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)
