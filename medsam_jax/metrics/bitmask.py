"""Morphology on masks packed 64 pixels to a word, for the NumPy form of the surface metrics.

Packed lattices have shape [..., words], little-endian: bit j of word w is column 64 w + j.
"""

from collections.abc import Sequence

import numpy as np

WORD = 64


def pack(mask: np.ndarray) -> np.ndarray:
    """Packs a bool array [..., X] along its last axis to uint64 words [..., X // 64 + 1].

    There is always one column of zeros after the last one.
    """
    *leading, columns = mask.shape
    words = np.zeros((*leading, columns // WORD + 1), "<u8")
    packed = np.packbits(mask, axis=-1, bitorder="little")
    words.view(np.uint8)[..., : packed.shape[-1]] = packed
    return words


def bounding_box(words: np.ndarray) -> tuple[slice, ...] | None:
    """Slices that hold every set bit, one per axis (the last counts words); None when empty."""
    box = []
    for axis in range(words.ndim):
        others = tuple(a for a in range(words.ndim) if a != axis)
        occupied = np.flatnonzero(np.bitwise_or.reduce(words, axis=others))
        if not occupied.size:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def pad_by_one(words: np.ndarray) -> np.ndarray:
    """Zeros around every axis but the last, and one zero word at its end."""
    return np.pad(words, [(1, 1)] * (words.ndim - 1) + [(0, 1)])


def shift_up(words: np.ndarray, columns: int) -> np.ndarray:
    """Moves every bit to a column higher by `columns`; what leaves the last word is lost."""
    whole, part = divmod(columns, WORD)
    shifted = np.zeros_like(words)
    if whole >= words.shape[-1]:
        return shifted
    source = words[..., : words.shape[-1] - whole]
    np.left_shift(source, np.uint64(part), out=shifted[..., whole:])
    if part:
        shifted[..., whole + 1 :] |= source[..., :-1] >> np.uint64(WORD - part)
    return shifted


def shift_down(words: np.ndarray, columns: int) -> np.ndarray:
    """Moves every bit to a column lower by `columns`; what leaves the first word is lost."""
    whole, part = divmod(columns, WORD)
    shifted = np.zeros_like(words)
    if whole >= words.shape[-1]:
        return shifted
    source = words[..., whole:]
    np.right_shift(source, np.uint64(part), out=shifted[..., : source.shape[-1]])
    if part:
        shifted[..., : source.shape[-1] - 1] |= source[..., 1:] << np.uint64(WORD - part)
    return shifted


def surface_cells(words: np.ndarray) -> np.ndarray:
    """Cells of the corner lattice whose pixels differ, from a mask padded by `pad_by_one`.

    Cell i of an axis lies between pixels i - 1 and i of the unpadded mask.
    """
    some = every = words
    for axis in range(words.ndim - 1):
        low, high = _halves(axis)
        some, every = some[low] | some[high], every[low] & every[high]
    some, every = some | shift_up(some, 1), every & shift_up(every, 1)
    return some & ~every


def _halves(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    before = (slice(None),) * axis
    return (*before, slice(None, -1)), (*before, slice(1, None))


def set_bits(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat word index and bit number of every set bit, in array order."""
    flat = words.ravel()
    occupied = np.flatnonzero(flat)
    bits = np.unpackbits(flat[occupied].view(np.uint8), bitorder="little")
    positions = np.flatnonzero(bits)
    return occupied[positions // WORD], (positions % WORD).astype(np.uint64)


def neighbour_codes(words: np.ndarray, cells: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Code of `tables` for cells (flat word indices and bits of `surface_cells`' lattice)."""
    lattice = tuple(n - 1 for n in words.shape[:-1]) + words.shape[-1:]
    index = np.unravel_index(cells, lattice)
    previous = shift_up(words, 1)
    codes = np.zeros(cells.shape, np.uint64)
    place = 0
    for corner in np.ndindex((2,) * (words.ndim - 1)):
        moved = [i + step for i, step in zip(index, corner, strict=False)]
        flat = np.ravel_multi_index((*moved, index[-1]), words.shape)
        for source in (previous, words):
            codes |= ((source.ravel()[flat] >> bits) & np.uint64(1)) << np.uint64(place)
            place += 1
    return codes.astype(np.uint8)


def dilate(words: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Sets every cell with a set cell near it.

    Args:
      words: [Y, W] or [Z, Y, W].
      reach: int [rows] or [planes, rows]: how many columns away a set cell may be when it is so
        many planes and rows away; -1 where no column is near enough.
    """
    if words.ndim == 2:
        return dilate(words[None], reach[None])[0]
    spread = {-1: None, 0: words}
    for columns in range(1, int(reach.max()) + 1):
        spread[columns] = spread[columns - 1] | shift_up(words, columns)
        spread[columns] |= shift_down(words, columns)
    result = np.zeros_like(words)
    for plane, plane_reach in enumerate(reach):
        near = np.zeros_like(words)
        for row, columns in enumerate(plane_reach):
            if columns >= 0:
                _or_shifted(near, spread[int(columns)], 1, row)
        _or_shifted(result, near, 0, plane)
    return result


def _or_shifted(result: np.ndarray, words: np.ndarray, axis: int, steps: int) -> None:
    """ORs into `result` the words moved by `steps` along an axis, both ways."""
    before = (slice(None),) * axis
    if steps == 0:
        result |= words
    elif steps < words.shape[axis]:
        low, high = (*before, slice(None, -steps)), (*before, slice(steps, None))
        result[low] |= words[high]
        result[high] |= words[low]


def reachable_columns(
    spacing: Sequence[float], tolerance: float, shape: Sequence[int]
) -> np.ndarray:
    """Table `reach` of `dilate` for a tolerance, no larger than a lattice of `shape` needs.

    Distances are computed as the distance transform of SciPy computes them, so that a distance
    equal to the tolerance counts as within it, or not, exactly as in surface-distance.
    """
    steps = [
        np.arange(min(int(tolerance / s) + 1, n - 1) + 1) if tolerance < s * n else np.arange(n)
        for s, n in zip(spacing, shape, strict=True)
    ]
    squares = [(step * s) ** 2 for step, s in zip(steps, spacing, strict=True)]
    total = squares[0]
    for square in squares[1:]:
        total = total[..., None] + square
    reach = (np.sqrt(total) <= tolerance).sum(axis=-1) - 1
    keep = tuple(slice(0, 1 + int(np.argwhere(reach >= 0)[:, a].max())) for a in range(reach.ndim))
    return reach[keep]
