"""Normalized surface Dice on the accelerator: the definition of `surface`, jitted and batched.

The 2D form packs 32 pixels to a word, marks the surface cells by bit operations, grows the other
mask's surface column by column and row by row until the tolerance is used up, and counts bits. The
counts are exact integers, so only the final lengths and division round.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from medsam_jax.metrics import tables
from medsam_jax.metrics.bitmask import reachable_columns
from medsam_jax.metrics.checks import check_spacing, check_tolerance

WORD = 32


def nsd_batch(
    pred: Bool[Array, "b h w"],
    target: Bool[Array, "b h w"],
    spacing: Sequence[float] | Float[Array, "b 2"] | Float[Array, " 2"],
    tolerance: float,
) -> Float[Array, " b"]:
    """Normalized surface Dice of each pair of 2D masks in a batch; nonzero is foreground.

    Args:
      spacing: (row, column), one for all or one per item. Known numbers are compared with the
        tolerance in float64 as in the NumPy form; a traced array in float32.
      tolerance: in the unit of `spacing`; a Python number.

    Returns:
      0 to 1; NaN where both masks are empty; 0 where one is.

    Raises:
      ValueError: shapes differ; known spacing is of the wrong length, not positive or not finite.
    """
    if pred.shape != target.shape or pred.ndim != 3:
        raise ValueError(f"pred {pred.shape} and target {target.shape} must be equal, [B, H, W]")
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
        reach = np.full((batch, height + 1), -1, np.int32)
        for pair in np.unique(rows, axis=0):
            table = reachable_columns(check_spacing(pair, 2), tolerance, (height + 1, width + 1))
            reach[(rows == pair).all(axis=1), : len(table)] = table
        spacing = rows.astype(np.float32)
    return _nsd_packed(pred, target, spacing, reach)


def nsd_volume(
    pred: Bool[Array, "d h w"],
    target: Bool[Array, "d h w"],
    spacing: Sequence[float],
    tolerance: float,
) -> Float[Array, ""]:
    """Normalized surface Dice of one pair of volumes; otherwise as `nsd_batch`.

    Raises:
      ValueError: also when `spacing` is traced. A loop over several spacings stays outside `jit`.
    """
    if isinstance(spacing, jax.core.Tracer):
        raise ValueError("spacing of a volume must be known numbers, not a traced array")
    tolerance, spacing = check_tolerance(tolerance), check_spacing(spacing, 3)
    lattice = tuple(n + 1 for n in pred.shape)
    table = reachable_columns(spacing, tolerance, lattice)
    reach = np.full((lattice[0], lattice[1]), -1, np.int32)
    reach[tuple(slice(0, n) for n in table.shape)] = table
    areas = tables.surface_areas(tuple(spacing)).astype(np.float32)
    return _nsd_volume(pred, target, areas, reach)


def _traced_reach(
    spacing: Float[Array, "b 2"], tolerance: float, height: int, width: int
) -> Int[Array, "b h"]:
    """`bitmask.reachable_columns` in float32 for spacing that is known only at run time."""
    row, column = spacing[:, :1], spacing[:, 1:]
    rows = (jnp.arange(height) * row) ** 2

    def distance(columns):
        return jnp.sqrt(rows + (columns * column) ** 2)

    guess = jnp.sqrt(jnp.maximum(tolerance**2 - rows, 0)) / column
    guess = jnp.clip(jnp.floor(guess), 0, width - 1)
    # The floor may be one off by rounding; the distance decides.
    best = jnp.where(distance(guess) <= tolerance, guess, guess - 1)
    best = jnp.where(distance(guess + 1) <= tolerance, guess + 1, best)
    return best.astype(jnp.int32)


@jax.jit
def _nsd_packed(
    pred: Bool[Array, "b h w"],
    target: Bool[Array, "b h w"],
    spacing: Float[Array, "b 2"],
    reach: Int[Array, "b h+1"],
) -> Float[Array, " b"]:
    batch = pred.shape[0]
    masks = _pack(jnp.concatenate([pred, target]).astype(bool))  # [2B, H+2, W/32+1]
    row, column = spacing[:, 0], spacing[:, 1]
    diagonal = 0.5 * jnp.hypot(row, column)

    upper, lower = masks[:, :-1], masks[:, 1:]
    a, b, c, d = _shift_up(upper), upper, _shift_up(lower), lower
    corner = a ^ b ^ c ^ d
    even = ~corner
    kinds = {  # by the table of `tables.contour_lengths`
        "diagonal": corner,
        "column": even & ~(a ^ b) & (a ^ c),
        "row": even & (a ^ b) & ~(a ^ c),
        "two_diagonals": even & (a ^ b) & (a ^ c),
    }
    surface = corner | kinds["column"] | kinds["row"] | kinds["two_diagonals"]
    other = jnp.roll(surface, batch, axis=0)
    near = _dilate(other, jnp.concatenate([reach, reach]))

    def length(cells):
        count = {
            kind: lax.population_count(bits & cells).sum((1, 2), dtype=jnp.int32)
            for kind, bits in kinds.items()
        }
        count = {kind: n[:batch] + n[batch:] for kind, n in count.items()}
        return (
            diagonal * (count["diagonal"] + 2 * count["two_diagonals"])
            + row * count["row"]
            + column * count["column"]
        )

    return length(near) / length(surface)


@jax.jit
def _nsd_volume(
    pred: Bool[Array, "d h w"],
    target: Bool[Array, "d h w"],
    areas: Float[Array, " 256"],
    reach: Int[Array, "d+1 h+1"],
) -> Float[Array, ""]:
    within = total = 0.0
    masks = [_pack(jnp.pad(mask.astype(bool), ((1, 1), (0, 0), (0, 0)))) for mask in (pred, target)]
    surfaces = [_volume_surface(words) for words in masks]
    for words, surface, other in zip(masks, surfaces, surfaces[::-1], strict=True):
        size = areas[_volume_codes(words)]  # [D+1, H+1, columns]
        near = _unpack(_dilate_volume(other, reach) & surface)
        # One axis at a time: partial sums keep float32 to about 1e-7.
        within += jnp.where(near, size, 0).sum(-1).sum(-1).sum()
        total += size.sum(-1).sum(-1).sum()
    return within / total


def _volume_surface(words: UInt32[Array, "d h w"]) -> UInt32[Array, "d h w"]:
    some = every = words
    for axis in (0, 1):
        low = lax.slice_in_dim(some, 0, -1, axis=axis), lax.slice_in_dim(every, 0, -1, axis=axis)
        some = low[0] | lax.slice_in_dim(some, 1, None, axis=axis)
        every = low[1] & lax.slice_in_dim(every, 1, None, axis=axis)
    return (some | _shift_up(some)) & ~(every & _shift_up(every))


def _volume_codes(words: UInt32[Array, "d h w"]) -> Int[Array, "d h columns"]:
    """Code of `tables` of every cell."""
    depth, height = words.shape[0] - 1, words.shape[1] - 1
    code = 0
    for bit, (z, y, x) in enumerate(tables.CORNERS):
        corner = words if x else _shift_up(words)
        present = _unpack(corner[z : z + depth, y : y + height])
        code |= present.astype(jnp.int32) << bit
    return code


def _unpack(words: UInt32[Array, "d h w"]) -> Bool[Array, "d h columns"]:
    bits = (words[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:2], -1).astype(bool)


def _dilate_volume(
    surface: UInt32[Array, "d h w"], reach: Int[Array, "d h"]
) -> UInt32[Array, "d h w"]:
    def grow_planes(plane, carry):
        near, up, down = carry
        near |= _dilate(up | down, reach[plane][None])
        return near, _move(up, 0, -1), _move(down, 0, 1)

    start = (jnp.zeros_like(surface), surface, surface)
    return lax.fori_loop(0, jnp.sum(reach[:, 0] >= 0), grow_planes, start)[0]


def _pack(masks: Bool[Array, "b h w"]) -> UInt32[Array, "b h+2 words"]:
    """Packs columns to words, with a row of zeros above and below and a zero column at the end."""
    batch, height, width = masks.shape
    words = width // WORD + 1
    padded = jnp.pad(masks, ((0, 0), (1, 1), (0, words * WORD - width)))
    bits = padded.reshape(batch, height + 2, words, WORD)
    place = jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.sum(bits.astype(jnp.uint32) << place, axis=-1, dtype=jnp.uint32)


def _shift_up(words: UInt32[Array, "b h w"]) -> UInt32[Array, "b h w"]:
    """Moves every bit one column up."""
    carry = jnp.pad(words[..., :-1] >> (WORD - 1), ((0, 0), (0, 0), (1, 0)))
    return (words << 1) | carry


def _shift_down(words: UInt32[Array, "b h w"]) -> UInt32[Array, "b h w"]:
    """Moves every bit one column down."""
    carry = jnp.pad(words[..., 1:] << (WORD - 1), ((0, 0), (0, 0), (0, 1)))
    return (words >> 1) | carry


def _dilate(surface: UInt32[Array, "b h w"], reach: Int[Array, "b h"]) -> UInt32[Array, "b h w"]:
    """Sets every cell that has a surface cell `rows` away and at most `reach[rows]` columns away.

    Both loops stop at the farthest row and column that any item of the batch can reach.
    """

    def grow_rows(rows, carry):
        near, up, down = carry
        columns_allowed = reach[:, rows, None, None]

        def grow_columns(columns, carry):
            near, left, right = carry
            near |= jnp.where(columns <= columns_allowed, left | right, 0)
            return near, _shift_down(left), _shift_up(right)

        both = up | down
        near, _, _ = lax.fori_loop(
            0, jnp.max(columns_allowed) + 1, grow_columns, (near, both, both)
        )
        return near, _move(up, 1, -1), _move(down, 1, 1)

    last_row = jnp.max(jnp.sum(reach >= 0, axis=1))
    start = (jnp.zeros_like(surface), surface, surface)
    return lax.fori_loop(0, last_row, grow_rows, start)[0]


def _move(words: UInt32[Array, "b h w"], axis: int, step: int) -> UInt32[Array, "b h w"]:
    """Moves the words one step along an axis; zeros come in."""
    padding = [(0, 0)] * words.ndim
    padding[axis] = (1, 0) if step > 0 else (0, 1)
    start = 0 if step > 0 else 1
    size = words.shape[axis]
    kept = lax.slice_in_dim(words, start, start + size - 1, axis=axis)
    return jnp.pad(kept, padding)
