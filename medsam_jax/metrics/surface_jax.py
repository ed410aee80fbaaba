"""Normalized surface Dice on the accelerator: the definition of `surface`, jitted and batched.

The 2D form packs 32 rows to a word, marks the surface cells by bit operations, grows the other
mask's surface row by row and column by column until the tolerance is used up, and counts bits. The
counts are exact integers, so only the final lengths and division round. Words hold rows, not
columns, so that the last axis of every array stays long: a CPU works on 16 columns at once.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from medsam_jax.metrics import surface_elements
from medsam_jax.metrics.bitmask import reachable_columns
from medsam_jax.metrics.checks import Spacing, as_mask, check_spacing, check_tolerance
from medsam_jax.metrics.overlap import Mask

WORD = 32


def nsd_batch(pred: Mask, target: Mask, spacing: Spacing, tolerance: float) -> Float[Array, " b"]:
    """Returns the normalized surface Dice of each pair of 2D masks; NaN where both are empty.

    Args:
      pred, target: [B, H, W], boolean, or 0 and 1; boolean where they are traced.
      spacing: (row, column), one for all or one per item. Known numbers are compared with the
        tolerance in float64 as in the NumPy form; a traced array in float32.
      tolerance: in the unit of `spacing`; a Python number.

    Raises:
      ValueError: shapes differ; no masks; known spacing is of the wrong length, not positive or
        not finite.
    """
    if pred.shape != target.shape or pred.ndim != 3:
        raise ValueError(f"pred {pred.shape} and target {target.shape} must be equal, [B, H, W]")
    pred, target = as_mask("pred", pred), as_mask("target", target)
    tolerance = check_tolerance(tolerance)
    batch, height, width = pred.shape
    if isinstance(spacing, jax.core.Tracer):
        spacing = jnp.broadcast_to(spacing, (batch, 2))
        reach = _traced_reach(spacing, tolerance, height + 1, width + 1)
    else:
        spacing = np.asarray(spacing, np.float64)
        if spacing.shape not in ((2,), (batch, 2)):
            raise ValueError(f"spacing has shape {spacing.shape}; expected (2,) or ({batch}, 2)")
        rows = np.broadcast_to(spacing, (batch, 2))
        reach = np.full((batch, width + 1), -1, np.int32)
        for pair in np.unique(rows, axis=0):
            table = _reachable_rows(check_spacing(pair, 2), tolerance, (height + 1, width + 1))
            reach[(rows == pair).all(axis=1), : len(table)] = table
        spacing = rows.astype(np.float32)
    return _nsd_packed(pred, target, spacing, reach)


def nsd_volume(pred: Mask, target: Mask, spacing: Spacing, tolerance: float) -> Float[Array, ""]:
    """Returns the normalized surface Dice of one pair of volumes [D, H, W]; see `nsd_batch`.

    Raises ValueError also when `spacing` is traced: several spacings are looped over outside `jit`.
    """
    if isinstance(spacing, jax.core.Tracer):
        raise ValueError("spacing of a volume must be known numbers, not a traced array")
    pred, target = as_mask("pred", pred), as_mask("target", target)
    tolerance, spacing = check_tolerance(tolerance), check_spacing(spacing, 3)
    lattice = tuple(n + 1 for n in pred.shape)
    table = _reachable_rows(spacing, tolerance, lattice)
    reach = np.full((lattice[0], lattice[2]), -1, np.int32)
    reach[tuple(slice(0, n) for n in table.shape)] = table
    areas = surface_elements.surface_areas(tuple(spacing)).astype(np.float32)
    return _nsd_volume(pred, target, areas, reach)


def _reachable_rows(
    spacing: np.ndarray, tolerance: float, lattice: tuple[int, ...]
) -> Int[np.ndarray, "... columns"]:
    """Returns the largest number of rows within the tolerance, by columns; -1 for none."""
    reach = reachable_columns(spacing, tolerance, lattice)
    columns = np.arange(reach.max() + 1)
    return (reach[..., None, :] >= columns[:, None]).sum(axis=-1) - 1


def _traced_reach(
    spacing: Float[Array, "b 2"], tolerance: float, height: int, width: int
) -> Int[Array, "b w"]:
    """Computes `_reachable_rows` in float32, for spacing known only at run time."""
    row, column = spacing[:, :1], spacing[:, 1:]
    columns = (jnp.arange(width) * column) ** 2

    def distance(rows):
        return jnp.sqrt((rows * row) ** 2 + columns)

    guess = jnp.sqrt(jnp.maximum(tolerance**2 - columns, 0)) / row
    guess = jnp.clip(jnp.floor(guess), 0, height - 1)
    # The floor may be one off by rounding; the distance decides.
    best = jnp.where(distance(guess) <= tolerance, guess, guess - 1)
    best = jnp.where(distance(guess + 1) <= tolerance, guess + 1, best)
    return best.astype(jnp.int32)


@jax.jit
def _nsd_packed(
    pred: Bool[Array, "b h w"],
    target: Bool[Array, "b h w"],
    spacing: Float[Array, "b 2"],
    reach: Int[Array, "b w+1"],
) -> Float[Array, " b"]:
    batch = pred.shape[0]
    masks = jnp.concatenate([_pack(pred), _pack(target)])  # [2B, H/32+1, W+2]
    row, column = spacing[:, 0], spacing[:, 1]
    diagonal = 0.5 * jnp.hypot(row, column)

    c, d = masks[:, :, :-1], masks[:, :, 1:]
    above = _shift_up(masks)
    a, b = above[:, :, :-1], above[:, :, 1:]
    corner = a ^ b ^ c ^ d
    even = ~corner
    # By the table of `surface_elements.contour_lengths`.
    along_row, along_column = even & ~(a ^ b) & (a ^ c), even & (a ^ b) & ~(a ^ c)
    two_corners = even & (a ^ b) & (a ^ c)
    kinds = corner, along_row, along_column, two_corners
    surface = corner | along_row | along_column | two_corners
    other = jnp.roll(surface, batch, axis=0)
    near = _dilate(other, jnp.concatenate([reach, reach]))

    def length(cells):
        counts = [lax.population_count(kind & cells).sum((1, 2), dtype=jnp.int32) for kind in kinds]
        one, in_rows, in_columns, two = (both[:batch] + both[batch:] for both in counts)
        return diagonal * (one + 2 * two) + row * in_columns + column * in_rows

    return length(near) / length(surface)


@jax.jit
def _nsd_volume(
    pred: Bool[Array, "d h w"],
    target: Bool[Array, "d h w"],
    areas: Float[Array, " 256"],
    reach: Int[Array, "d+1 w+1"],
) -> Float[Array, ""]:
    within = total = 0.0
    masks = [jnp.pad(_pack(mask), ((1, 1), (0, 0), (0, 0))) for mask in (pred, target)]
    surfaces = [_volume_surface(words) for words in masks]
    for words, surface, other in zip(masks, surfaces, surfaces[::-1], strict=True):
        size = areas[_volume_codes(words)]  # [D+1, rows, W+1]
        near = _unpack(_dilate_volume(other, reach) & surface)
        # One axis at a time: partial sums keep float32 to about 1e-7.
        within += jnp.where(near, size, 0).sum(-1).sum(-1).sum()
        total += size.sum(-1).sum(-1).sum()
    return within / total


def _volume_surface(words: UInt32[Array, "d h w"]) -> UInt32[Array, "d-1 h w-1"]:
    some, every = words[:-1] | words[1:], words[:-1] & words[1:]
    some, every = some[..., :-1] | some[..., 1:], every[..., :-1] & every[..., 1:]
    return (some | _shift_up(some)) & ~(every & _shift_up(every))


def _volume_codes(words: UInt32[Array, "d h w"]) -> Int[Array, "d-1 rows w-1"]:
    """Returns the code of `surface_elements` of every cell."""
    depth, width = words.shape[0] - 1, words.shape[2] - 1
    code = 0
    for bit, (z, y, x) in enumerate(surface_elements.CORNERS):
        corner = words if y else _shift_up(words)
        present = _unpack(corner[z : z + depth, :, x : x + width])
        code |= present.astype(jnp.int32) << bit
    return code


def _unpack(words: UInt32[Array, "d h w"]) -> Bool[Array, "d rows w"]:
    bits = (words[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[:, None]) & 1
    return bits.reshape(words.shape[0], -1, words.shape[2]).astype(bool)


def _dilate_volume(
    surface: UInt32[Array, "d h w"], reach: Int[Array, "d w"]
) -> UInt32[Array, "d h w"]:
    def grow_planes(plane, carry):
        near, up, down = carry
        near |= _dilate(up | down, reach[plane][None])
        up = jnp.pad(up[1:], ((0, 1), (0, 0), (0, 0)))
        return near, up, jnp.pad(down[:-1], ((1, 0), (0, 0), (0, 0)))

    start = (jnp.zeros_like(surface), surface, surface)
    return lax.fori_loop(0, jnp.sum(reach[:, 0] >= 0), grow_planes, start)[0]


def _pack(masks: Bool[Array, "b h w"]) -> UInt32[Array, "b words w+2"]:
    """Packs rows to words, with a column of zeros on either side and a zero row at the end."""
    batch, height, width = masks.shape
    whole = height // WORD
    full = masks[:, : whole * WORD].reshape(batch, whole, WORD, width)
    rest = masks[:, whole * WORD :][:, None]  # fewer rows than a word has, perhaps none
    words = [_pack_rows(full), _pack_rows(rest)]
    return jnp.pad(jnp.concatenate(words, axis=1), ((0, 0), (0, 0), (1, 1)))


def _pack_rows(bits: Bool[Array, "b n rows w"]) -> UInt32[Array, "b n w"]:
    """Packs row i of `rows` as bit i, by a chain of shifts and ors, which XLA fuses on a CPU."""
    rows = [bits[:, :, i].astype(jnp.uint32) << i for i in range(bits.shape[2])]
    nothing = jnp.zeros((*bits.shape[:2], bits.shape[3]), jnp.uint32)
    return functools.reduce(operator.or_, rows, nothing)


def _shift_up(words: UInt32[Array, "b h w"]) -> UInt32[Array, "b h w"]:
    """Moves every bit one row on."""
    carry = jnp.pad(words[:, :-1] >> (WORD - 1), ((0, 0), (1, 0), (0, 0)))
    return (words << 1) | carry


def _shift_down(words: UInt32[Array, "b h w"]) -> UInt32[Array, "b h w"]:
    """Moves every bit one row back."""
    carry = jnp.pad(words[:, 1:] << (WORD - 1), ((0, 0), (0, 1), (0, 0)))
    return (words >> 1) | carry


def _dilate(surface: UInt32[Array, "b h w"], reach: Int[Array, "#b w"]) -> UInt32[Array, "b h w"]:
    """Sets every cell that has a surface cell `columns` away and at most `reach[columns]` rows.

    Both loops stop at the farthest column and row that any item of the batch can reach.
    """
    width = surface.shape[2]
    wide = jnp.pad(surface, ((0, 0), (0, 0), (width, width)))

    def grow_columns(columns, near):
        left = lax.dynamic_slice_in_dim(wide, width - columns, width, axis=2)
        right = lax.dynamic_slice_in_dim(wide, width + columns, width, axis=2)
        rows_allowed = reach[:, columns, None, None]

        def grow_rows(rows, carry):
            near, up, down = carry
            near |= jnp.where(rows <= rows_allowed, up | down, 0)
            return near, _shift_up(up), _shift_down(down)

        both = left | right
        return lax.fori_loop(0, jnp.max(rows_allowed) + 1, grow_rows, (near, both, both))[0]

    last_column = jnp.max(jnp.sum(reach >= 0, axis=1))
    return lax.fori_loop(0, last_column, grow_columns, jnp.zeros_like(surface))
