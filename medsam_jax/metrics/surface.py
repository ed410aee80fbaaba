"""Normalized surface Dice (NSD), Hausdorff distance and average surface distance.

Definition: DeepMind's surface-distance (Nikolov et al. 2018, arXiv:1809.04430). The surface is
made of elements with a length (2D) or an area (3D), see `tables`; an element lies within the
tolerance when the distance between cell centres, to the nearest surface cell of the other mask, is
at most the tolerance. Spacing is in array order: (z, y, x) or (row, column).

Differences: an empty mask has the policy of `overlap`; where the tolerance is small, a search of
the neighbourhood (bit-parallel, see `bitmask`) replaces the distance transform. The result is the
same. 2D masks are scored as contours: a 2D mask is never taken for a slab.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from medsam_jax.metrics import bitmask, tables
from medsam_jax.metrics.checks import (
    as_mask,
    check_shapes,
    check_spacing,
    check_tolerance,
    is_jax,
)
from medsam_jax.metrics.overlap import Mask
from medsam_jax.metrics.surface_jax import nsd_batch, nsd_volume

__all__ = [
    "average_surface_distance",
    "hausdorff_distance",
    "normalized_surface_dice",
    "nsd_batch",
    "surface_distances",
]

# Word operations of the neighbourhood search that cost as much as a nearest-neighbour tree.
_SEARCH_LIMIT = 400_000_000


def normalized_surface_dice(
    pred: Mask, target: Mask, spacing: Sequence[float], tolerance: float
) -> float | Float[Array, ""]:
    """Share of both surfaces that lies within `tolerance` of the other surface.

    Args:
      pred, target: masks of one shape, [H, W] or [D, H, W]. NumPy arrays give a Python float; jax
        arrays give a float32 scalar and work under `jit` and `vmap`.
      spacing: distance between pixels along each array axis. Ones measure in pixels.
      tolerance: in the unit of `spacing`. A Python number, static under `jit`.

    Returns:
      0 to 1; NaN when both masks are empty; 0 when one is.

    Raises:
      ValueError: shapes differ, spacing has the wrong length or is not positive, the tolerance is
        negative, or a NumPy mask holds anything but 0, 1 and booleans.
    """
    check_shapes(pred, target, (2, 3))
    tolerance = check_tolerance(tolerance)
    if is_jax(pred, target, spacing):
        if pred.ndim == 3:
            return nsd_volume(pred, target, spacing, tolerance)
        return nsd_batch(pred[None], target[None], spacing, tolerance)[0]
    spacing = check_spacing(spacing, pred.ndim)
    pair = _surfaces(pred, target)
    if pair is None:
        return float("nan")
    if not pair[0].cells.any() or not pair[1].cells.any():
        return 0.0
    reach = bitmask.reachable_columns(spacing, tolerance, pair[0].lattice)
    if pair[0].cells.size * (2 * reach.size + 2 * reach.max()) < _SEARCH_LIMIT:
        within, total = _overlap_by_search(pair, spacing, reach)
    else:
        within, total = _overlap_by_distance(pair, spacing, tolerance)
    return float(within / total)


def hausdorff_distance(
    pred: np.ndarray, target: np.ndarray, spacing: Sequence[float], percentile: float = 95.0
) -> float:
    """Hausdorff distance at a percentile of the surface (HD95), in the unit of `spacing`.

    The greater of the two directed percentiles, each weighted by length or area. NaN when both
    masks are empty, infinite when one is.

    Raises:
      ValueError: as `normalized_surface_dice`.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it must lie between 0 and 100")
    directed = surface_distances(pred, target, spacing)
    if directed is None:
        return float("nan")
    return max(_percentile(*one, percentile) for one in directed)


def average_surface_distance(
    pred: np.ndarray, target: np.ndarray, spacing: Sequence[float]
) -> float:
    """Mean distance from either surface to the other (ASD), in the unit of `spacing`.

    Both surfaces' elements enter one mean, weighted by length or area. NaN when both masks are
    empty, infinite when one is.

    Raises:
      ValueError: as `normalized_surface_dice`.
    """
    directed = surface_distances(pred, target, spacing)
    if directed is None:
        return float("nan")
    weighted = sum((distances * sizes).sum() for distances, sizes in directed)
    return float(weighted / sum(sizes.sum() for _, sizes in directed))


def surface_distances(
    pred: np.ndarray, target: np.ndarray, spacing: Sequence[float]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
    """Distances and sizes of surface elements, ((target to pred), (pred to target)).

    Returns:
      For each direction the distances [n] to the other surface, infinite where that is empty, and
      the lengths or areas [n] of the elements. None when both masks are empty.
    """
    check_shapes(pred, target, (2, 3))
    spacing = check_spacing(spacing, np.ndim(pred))
    pair = _surfaces(pred, target)
    if pair is None:
        return None
    pred_surface, target_surface = pair
    return (
        _directed(target_surface, pred_surface, spacing),
        _directed(pred_surface, target_surface, spacing),
    )


class _Surface(NamedTuple):
    """A cropped, packed mask and its surface cells."""

    words: np.ndarray  # [..., W], padded by one
    cells: np.ndarray  # [..., W], one less along each leading axis

    @property
    def lattice(self) -> tuple[int, ...]:
        return (*self.cells.shape[:-1], self.cells.shape[-1] * bitmask.WORD)

    def elements(self, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat word index, bit, and length or area of every surface element."""
        index, bits = bitmask.set_bits(self.cells)
        codes = bitmask.neighbour_codes(self.words, index, bits)
        return index, bits, tables.element_sizes(tuple(spacing))[codes]

    def coordinates(self) -> np.ndarray:
        """Integer lattice coordinates [n, axes] of the surface cells."""
        index, bits = bitmask.set_bits(self.cells)
        *leading, word = np.unravel_index(index, self.cells.shape)
        return np.stack([*leading, word * bitmask.WORD + bits.astype(np.int64)], axis=-1)


def _surfaces(pred: np.ndarray, target: np.ndarray) -> tuple[_Surface, _Surface] | None:
    """Both surfaces on the lattice of the masks' common bounding box; None when both are empty."""
    packed = bitmask.pack(as_mask("pred", pred)), bitmask.pack(as_mask("target", target))
    box = bitmask.bounding_box(packed[0] | packed[1])
    if box is None:
        return None
    padded = [bitmask.pad_by_one(words[box]) for words in packed]
    return tuple(_Surface(words, bitmask.surface_cells(words)) for words in padded)


def _overlap_by_search(
    pair: tuple[_Surface, _Surface], spacing: np.ndarray, reach: np.ndarray
) -> tuple[float, float]:
    """Size of the elements within the tolerance, and of all, over both surfaces."""
    within = total = 0.0
    for one, other in (pair, pair[::-1]):
        near = bitmask.dilate(other.cells, reach).ravel()
        index, bits, sizes = one.elements(spacing)
        within += sizes[((near[index] >> bits) & np.uint64(1)).astype(bool)].sum()
        total += sizes.sum()
    return within, total


def _overlap_by_distance(
    pair: tuple[_Surface, _Surface], spacing: np.ndarray, tolerance: float
) -> tuple[float, float]:
    within = total = 0.0
    for one, other in (pair, pair[::-1]):
        distances, sizes = _directed(one, other, spacing)
        within += sizes[distances <= tolerance].sum()
        total += sizes.sum()
    return within, total


def _directed(one: _Surface, other: _Surface, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance from each element of one surface to the nearest cell of the other, and its size."""
    from scipy.spatial import cKDTree

    sizes = one.elements(spacing)[2]
    points, others = one.coordinates(), other.coordinates()
    if not len(others):
        return np.full(len(points), np.inf), sizes
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    nearest = tree.query(points * spacing, workers=-1)[1]
    # From whole steps, so that equal distances are equal numbers.
    squares = ((points - others[nearest]) * spacing) ** 2
    return np.sqrt(np.add.reduce(squares.T, axis=0)), sizes


def _percentile(distances: np.ndarray, sizes: np.ndarray, percentile: float) -> float:
    """Smallest distance that covers `percentile` per cent of the surface."""
    if not len(distances):
        return float("inf")
    order = np.argsort(distances, kind="stable")
    covered = np.cumsum(sizes[order]) / sizes.sum()
    position = np.searchsorted(covered, percentile / 100)
    return float(distances[order][min(position, len(order) - 1)])
