"""Writes metrics.npz: pairs of masks with the scores that DeepMind's surface-distance gives them.

    pip install surface-distance scipy numpy && python tests/golden/make_metrics.py

Also the loader that tests/parity uses: the published package predates NumPy 2 and SciPy 1.15.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage

SEED = 20240122
TOLERANCES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)


def load_reference():
    """`surface_distance.metrics` with the aliases it needs that NumPy and SciPy have dropped."""
    np.NaN, np.Inf = np.nan, np.inf
    ndimage.filters = ndimage.morphology = ndimage
    from surface_distance import metrics

    return metrics


def reference_scores(reference, pred, target, spacing, tolerances) -> dict[str, float]:
    distances = reference.compute_surface_distances(target, pred, list(spacing))
    scores = {
        f"nsd_{tolerance:g}": reference.compute_surface_dice_at_tolerance(distances, tolerance)
        for tolerance in tolerances
    }
    scores["dice"] = reference.compute_dice_coefficient(target, pred)
    if pred.any() and target.any():
        scores["hd95"] = reference.compute_robust_hausdorff(distances, 95)
        pairs = [("distances_gt_to_pred", "surfel_areas_gt")]
        pairs += [("distances_pred_to_gt", "surfel_areas_pred")]
        weighted = sum((distances[d] * distances[a]).sum() for d, a in pairs)
        scores["asd"] = weighted / sum(distances[a].sum() for _, a in pairs)
    return scores


def random_pair(rng: np.random.Generator, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """A pair of masks: smooth, noisy, full, single-voxel, nested, touching or barely different."""
    limit = 72 if ndim == 2 else 18
    shape = tuple(rng.integers(1, limit, ndim))
    first = _random_mask(rng, shape)
    kind = rng.integers(5)
    if kind == 0:
        second = first ^ (rng.random(shape) < 0.02)
    elif kind == 1:
        second = ndimage.binary_erosion(first)
    elif kind == 2:
        second = ndimage.binary_dilation(first) & ~first
    elif kind == 3:
        second = np.roll(first, rng.integers(0, 4, ndim), axis=tuple(range(ndim)))
    else:
        second = _random_mask(rng, shape)
    return first, second


def random_spacing(rng: np.random.Generator, ndim: int) -> np.ndarray:
    if rng.random() < 0.3:
        return np.ones(ndim)
    return rng.uniform(0.3, 4, ndim)


def _random_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    kind = rng.integers(5)
    if kind == 0:
        return rng.random(shape) < rng.uniform(0.01, 0.9)
    if kind == 1:
        mask = np.zeros(shape, bool)
        mask[tuple(rng.integers(0, n) for n in shape)] = True
        return mask
    if kind == 2:
        return np.ones(shape, bool)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(0.5, 4))
    return field > np.quantile(field, rng.uniform(0.1, 0.95))


def main():
    reference = load_reference()
    rng = np.random.default_rng(SEED)
    arrays = {}
    for i in range(40):
        pred, target = random_pair(rng, 2 + i % 2)
        spacing = random_spacing(rng, pred.ndim)
        with np.errstate(invalid="ignore"):
            scores = reference_scores(reference, pred, target, spacing, TOLERANCES)
        arrays[f"{i}/pred"], arrays[f"{i}/target"] = pred, target
        arrays[f"{i}/spacing"] = spacing
        arrays[f"{i}/names"] = np.array(list(scores))
        arrays[f"{i}/values"] = np.array(list(scores.values()))
    np.savez_compressed(Path(__file__).with_name("metrics.npz"), **arrays)


if __name__ == "__main__":
    main()
