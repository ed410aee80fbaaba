"""Normalized surface Dice (NSD), Hausdorff distance and average surface distance.

Definition: DeepMind's surface-distance (Nikolov et al. 2018, arXiv:1809.04430). The surface is
made of elements with a length (2D) or an area (3D), see `surface_elements`; an element lies within
the tolerance when the distance between cell centres, to the nearest surface cell of the other
mask, is at most the tolerance. Spacing is in array order: (z, y, x) or (row, column).

Differences: empty masks follow the policy of `overlap`; where the tolerance is small, a search of
the neighbourhood (bit-parallel, see `bitmask`) replaces the distance transform. The result is the
same. 2D masks are scored as contours, never as slabs.
"""

import numpy as np
from jaxtyping import Array, Float

from medsam_jax.metrics import bitmask, surface_elements
from medsam_jax.metrics.checks import (
    Spacing,
    as_mask,
    check_shapes,
    check_spacing,
    check_tolerance,
    is_jax,
)
from medsam_jax.metrics.overlap import Mask
from medsam_jax.metrics.surface_jax import nsd_batch, nsd_volume

# Distances [n] to the other surface and sizes [n] of elements: of target to pred, pred to target.
Directed = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Word operations of the neighbourhood search that cost as much as a nearest-neighbour tree.
_SEARCH_LIMIT = 200_000_000
# Starting threads for fewer points than this takes longer than finding their neighbours.
_THREADED_POINTS = 20_000


def normalized_surface_dice(
    pred: Mask, target: Mask, spacing: Spacing, tolerance: float
) -> float | Float[Array, ""]:
    """Returns the share of both surfaces within `tolerance` of the other; NaN for two empty masks.

    Args:
      pred, target: masks of one shape, [H, W] or [D, H, W]. NumPy arrays give a Python float; jax
        arrays give a float32 scalar and work under `jit` and `vmap`.
      spacing: distance between pixels along each array axis. Ones measure in pixels.
      tolerance: in the unit of `spacing`. A Python number, static under `jit`.

    Raises:
      ValueError: shapes differ, spacing has the wrong length or is not positive, the tolerance is
        negative, or a mask holds anything but booleans, or 0 and 1.
    """
    check_shapes(pred, target, (2, 3))
    tolerance = check_tolerance(tolerance)
    if is_jax(pred, target, spacing):
        if pred.ndim == 3:
            return nsd_volume(pred, target, spacing, tolerance)
        return nsd_batch(pred[None], target[None], spacing, tolerance)[0]
    spacing = check_spacing(spacing, pred.ndim)
    surfaces = _Surfaces.of(pred, target)
    if surfaces is None:
        return float("nan")
    sizes = surfaces.sizes(spacing)
    return float(sizes[surfaces.near_each_other(spacing, tolerance)].sum() / sizes.sum())


def hausdorff_distance(
    pred: np.ndarray, target: np.ndarray, spacing: Spacing, percentile: float = 95.0
) -> float:
    """Returns the Hausdorff distance at a percentile of the surface (HD95), in `spacing`'s unit.

    The greater of the two directed percentiles, each weighted by length or area. NaN when both
    masks are empty, infinite when one is. Raises ValueError as `normalized_surface_dice` does.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it must lie between 0 and 100")
    return distance_percentile(surface_distances(pred, target, spacing), percentile)


def average_surface_distance(pred: np.ndarray, target: np.ndarray, spacing: Spacing) -> float:
    """Returns the mean distance from either surface to the other (ASD), in `spacing`'s unit.

    Both surfaces' elements enter one mean, weighted by length or area. NaN when both masks are
    empty, infinite when one is. Raises ValueError as `normalized_surface_dice` does.
    """
    return average_distance(surface_distances(pred, target, spacing))


def surface_distances(pred: np.ndarray, target: np.ndarray, spacing: Spacing) -> Directed | None:
    """Returns distances and sizes of surface elements, ((target to pred), (pred to target)).

    Distances [n] are infinite where the other surface is empty; sizes [n] are lengths or areas.
    None when both masks are empty.
    """
    check_shapes(pred, target, (2, 3))
    spacing = check_spacing(spacing, np.ndim(pred))
    surfaces = _Surfaces.of(pred, target)
    if surfaces is None:
        return None
    sizes, distances = surfaces.sizes(spacing), surfaces.distances(spacing)
    is_pred = surfaces.index < surfaces.cells[0].size
    return (distances[~is_pred], sizes[~is_pred]), (distances[is_pred], sizes[is_pred])


class _Surfaces:
    """The surface elements of a pair of masks, on the lattice of their common bounding box."""

    def __init__(self, words: np.ndarray):
        self.words = words  # [2, ..., W]
        self.cells = bitmask.surface_cells(words)  # [2, ..., W], one less along each middle axis
        self.index, self.bits = bitmask.set_bits(self.cells)  # the first mask's elements first

    @classmethod
    def of(cls, pred: np.ndarray, target: np.ndarray) -> "_Surfaces | None":
        """Packs a pair of masks; None when both are empty."""
        words = bitmask.pack([as_mask("pred", pred), as_mask("target", target)])
        box = bitmask.bounding_box(words)
        return None if box is None else cls(bitmask.crop_and_pad(words, box))

    def sizes(self, spacing: np.ndarray) -> np.ndarray:
        """Returns the length or area [n] of every element."""
        codes = bitmask.neighbour_codes(self.words, self.index, self.bits)
        return surface_elements.element_sizes(tuple(spacing))[codes]

    def near_each_other(self, spacing: np.ndarray, tolerance: float) -> np.ndarray:
        """Tells, [n], which elements lie within the tolerance of the other surface."""
        lattice = (*self.cells.shape[1:-1], self.cells.shape[-1] * bitmask.WORD)
        reach = bitmask.reachable_columns(spacing, tolerance, lattice)
        if self.cells.size * (reach.size + reach.max()) > _SEARCH_LIMIT:
            return self.distances(spacing) <= tolerance
        near = bitmask.dilate(self.cells, reach)[::-1].ravel()
        return ((near[self.index] >> self.bits) & np.uint64(1)).astype(bool)

    def distances(self, spacing: np.ndarray) -> np.ndarray:
        """Returns the distance [n] of every element to the nearest cell of the other surface."""
        mask, *leading, word = np.unravel_index(self.index, self.cells.shape)
        column = word * bitmask.WORD + self.bits.astype(np.int64)
        points = np.stack([*leading, column], axis=-1)
        pred, target = points[mask == 0], points[mask == 1]
        both = _distances(pred, target, spacing), _distances(target, pred, spacing)
        return np.concatenate(both)


def _distances(points: np.ndarray, others: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Returns distances [n] from lattice points to the nearest of the others; infinite if none."""
    from scipy.spatial import cKDTree

    if not len(others):
        return np.full(len(points), np.inf)
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    threads = 1 if len(points) < _THREADED_POINTS else -1
    nearest = tree.query(points * spacing, workers=threads)[1]
    # From whole steps, so that equal distances are equal numbers.
    squares = ((points - others[nearest]) * spacing) ** 2
    return np.sqrt(np.add.reduce(squares.T, axis=0))


def average_distance(directed: Directed | None) -> float:
    """Returns the mean distance over the elements of both surfaces; NaN for two empty masks."""
    if directed is None:
        return float("nan")
    weighted = sum((distances * sizes).sum() for distances, sizes in directed)
    return float(weighted / sum(sizes.sum() for _, sizes in directed))


def distance_percentile(directed: Directed | None, percentile: float) -> float:
    """Returns the greater percentile of both directions; NaN for two empty masks."""
    if directed is None:
        return float("nan")
    return max(_percentile(*one, percentile) for one in directed)


def _percentile(distances: np.ndarray, sizes: np.ndarray, percentile: float) -> float:
    """Returns the smallest distance that covers `percentile` per cent of the surface."""
    if not len(distances):
        return float("inf")
    order = np.argsort(distances, kind="stable")
    covered = np.cumsum(sizes[order]) / sizes.sum()
    position = np.searchsorted(covered, percentile / 100)
    return float(distances[order][min(position, len(order) - 1)])
