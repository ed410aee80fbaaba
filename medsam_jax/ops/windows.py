"""Self-attention within windows of a map; the last windows are padded with zeros."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.form import Form
from medsam_jax.ops.strips import join_rows, map_strips, rows_of, split_rows

_STRIP_BYTES = 3 << 20  # of the map per strip; a strip has at least one row of windows


def attend_in_windows(
    attention: Callable[[Array], Array], x: Float[Array, "b h w c"], size: int, form: Form
) -> Float[Array, "b h w d"]:
    """Applies self-attention, [n, size, size, c] to [n, size, size, d], to each window of tokens.

    Plain form: `window_unpartition(attention(window_partition(x)))`, as in segment_anything.
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))

    def attend(rows: Float[Array, "b r w c"]) -> Float[Array, "b r w d"]:
        windows = window_partition(rows, size)
        full = jnp.pad(windows, ((0, _spare(windows, form)), (0, 0), (0, 0), (0, 0)))
        return window_unpartition(attention(full)[: len(windows)], rows.shape)

    if form.cpu:
        strips = split_rows(x, rows_of(_STRIP_BYTES, *x.shape[2:]), multiple=size)
        x = join_rows(map_strips(attend, strips))
    else:
        x = attend(x)
    return x[:, :height, :width]


def _spare(windows: Float[Array, "n size size c"], form: Form) -> int:
    """Returns how many windows to add for a multiple of 8 tokens on an accelerator.

    Otherwise XLA copies operands and results of every product in half precision on GPUs. A batch
    that is sharded over devices is left as it is.
    """
    if form.device != "accelerator" or (form.mesh is not None and form.mesh.size > 1):
        return 0
    count, tokens = len(windows), windows.shape[1] * windows.shape[2]
    return next(spare for spare in range(8) if (count + spare) * tokens % 8 == 0)


def window_partition(x: Float[Array, "b h w c"], size: int) -> Float[Array, "n size size c"]:
    """Splits a map into windows; `size` divides its height and width."""
    batch, height, width, dim = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, dim)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size, size, dim)


def window_unpartition(
    windows: Float[Array, "n size size d"], shape: tuple[int, int, int, int]
) -> Float[Array, "b h w d"]:
    """Joins windows to a map with the batch, height and width of `shape` [b, h, w, c]."""
    (batch, height, width, _), size = shape, windows.shape[1]
    x = windows.reshape(batch, height // size, width // size, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)
