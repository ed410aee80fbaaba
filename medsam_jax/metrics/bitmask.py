"""Morphology on masks with 64 pixels per word, for the NumPy form of the surface metrics.

Arrays are stacks [N, ..., words] of packed masks, little-endian: bit j of word w is column
64 w + j. A pair of masks is one stack, which halves the number of NumPy calls.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from medsam_jax.metrics.checks import Spacing

WORD = 64
_ONE = np.uint64(1)


def pack(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Packs bool arrays [..., X] of one shape to uint64 words [N, ..., X // 64 + 1].

    At least one column of zeros follows the last one.
    """
    *leading, columns = masks[0].shape
    words = np.zeros((len(masks), *leading, columns // WORD + 1), "<u8")
    used = words.view(np.uint8)[..., : -(-columns // 8)]
    for place, mask in zip(used, masks, strict=True):
        place[...] = np.packbits(mask, axis=-1, bitorder="little")
    return words


def bounding_box(words: np.ndarray) -> tuple[slice, ...] | None:
    """Returns the slices that contain all set bits, in words along the last axis; None if empty."""
    union = np.bitwise_or.reduce(words, axis=0)
    box = []
    for axis in range(union.ndim):
        others = tuple(a for a in range(union.ndim) if a != axis)
        occupied = np.flatnonzero(np.bitwise_or.reduce(union, axis=others))
        if not occupied.size:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def crop_and_pad(words: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """Crops every mask to `box` and pads each axis with zeros, at least one column at the end."""
    *leading, last = (part.stop - part.start for part in box)
    full = bool((words[..., box[-1].stop - 1] >> np.uint64(WORD - 1)).any())
    padded = np.zeros((len(words), *(n + 2 for n in leading), last + full), words.dtype)
    padded[(slice(None), *(slice(1, -1),) * len(leading), slice(last))] = words[:, *box]
    return padded


def shift(words: np.ndarray, columns: int) -> np.ndarray:
    """Moves every bit up by `columns` columns, down if negative; bits past the ends are dropped."""
    whole, part = divmod(abs(columns), WORD)
    up = columns > 0
    if words.shape[-1] == 1 and not whole:
        return words << np.uint64(part) if up else words >> np.uint64(part)
    shifted = np.zeros_like(words)
    kept = words.shape[-1] - whole
    if kept <= 0:
        return shifted
    source = words[..., :kept] if up else words[..., whole:]
    target = shifted[..., whole:] if up else shifted[..., :kept]
    (np.left_shift if up else np.right_shift)(source, np.uint64(part), out=target)
    if part and up:
        target[..., 1:] |= source[..., :-1] >> np.uint64(WORD - part)
    elif part:
        target[..., :-1] |= source[..., 1:] << np.uint64(WORD - part)
    return shifted


def surface_cells(words: np.ndarray) -> np.ndarray:
    """Marks cells of the corner lattice whose pixels differ, for masks from `crop_and_pad`.

    Cell i of an axis lies between pixels i - 1 and i of the unpadded mask.
    """
    some = every = words
    for axis in range(1, words.ndim - 1):
        low, high = _ends(axis, 1)
        some, every = some[low] | some[high], every[low] & every[high]
    some, every = some | shift(some, 1), every & shift(every, 1)
    return some & ~every


def _ends(axis: int, steps: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Returns indices of all but the last `steps` places along an axis, and all but the first."""
    before = (slice(None),) * axis
    return (*before, slice(None, -steps)), (*before, slice(steps, None))


def set_bits(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the flat word index and bit number of every set bit, in array order."""
    flat = words.ravel()
    occupied = np.flatnonzero(flat)
    bits = np.unpackbits(flat[occupied].view(np.uint8), bitorder="little")
    positions = np.flatnonzero(bits)
    return occupied[positions // WORD], (positions % WORD).astype(np.uint64)


def neighbour_codes(words: np.ndarray, cells: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Returns the codes of cells, given as word indices and bits of `surface_cells`' lattice."""
    offsets = np.zeros(1, np.int64)
    stride = words.shape[-1]
    for size in words.shape[-2:0:-1]:
        offsets = np.concatenate([offsets, offsets + stride])
        # The masks are longer than the lattice by one along every leading axis.
        cells = cells + cells // ((size - 1) * stride) * stride
        stride *= size
    flat, previous = words.ravel(), shift(words, 1).ravel()
    codes = np.zeros(cells.shape, np.uint64)
    for i, offset in enumerate(offsets):
        corner = cells + offset
        codes |= ((previous[corner] >> bits) & _ONE) << np.uint64(2 * i)
        codes |= ((flat[corner] >> bits) & _ONE) << np.uint64(2 * i + 1)
    return codes.astype(np.uint8)


def dilate(words: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Sets every cell of words [N, Y, W] or [N, Z, Y, W] with a set cell near it.

    `reach`, int [rows] or [planes, rows], is the largest column distance to a set cell that is
    `planes` planes and `rows` rows away; -1 if no column is near enough.
    """
    spread = [words]
    for columns in range(1, int(reach.max()) + 1):
        spread.append(spread[-1] | shift(words, columns))
        spread[-1] |= shift(words, -columns)
    planes = [
        _or_shifted([spread[columns] for columns in row if columns >= 0], words.ndim - 2)
        for row in np.atleast_2d(reach)
    ]
    return planes[0] if words.ndim == 3 else _or_shifted(planes, 1)


def _or_shifted(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    """ORs the arrays, each moved along an axis, both ways, by its position in the list."""
    result = arrays[0].copy()
    for steps, words in enumerate(arrays[1:], start=1):
        if steps < words.shape[axis]:
            low, high = _ends(axis, steps)
            result[low] |= words[high]
            result[high] |= words[low]
    return result


def reachable_columns(spacing: Spacing, tolerance: float, shape: Sequence[int]) -> np.ndarray:
    """Returns the table `reach` of `dilate` for a tolerance, limited to a lattice of `shape`.

    Distances are rounded as in SciPy's distance transform. A distance equal to the tolerance
    therefore counts as within it exactly when it does in surface-distance.
    """
    spacing, tolerance = tuple(map(float, spacing)), float(tolerance)
    # Two more than the quotient, because rounding may make it one too low.
    steps = (int(min(tolerance / s + 2, n)) for s, n in zip(spacing, shape, strict=True))
    return _reach(spacing, tolerance, tuple(steps))


@lru_cache(maxsize=256)
def _reach(spacing: tuple[float, ...], tolerance: float, steps: tuple[int, ...]) -> np.ndarray:
    """Returns the table of `reachable_columns` for `steps` steps along each axis, including 0."""
    total = np.zeros(())
    for step, count in zip(spacing, steps, strict=True):
        total = total[..., None] + (np.arange(count) * step) ** 2
    reach = (np.sqrt(total) <= tolerance).sum(axis=-1) - 1
    reach = reach[tuple(slice(0, np.nonzero(reach >= 0)[a].max() + 1) for a in range(reach.ndim))]
    reach.setflags(write=False)
    return reach
