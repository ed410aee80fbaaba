"""Tumour burden: volume and RECIST/WHO diameters of a mask, and how well two sets of them agree."""

import numpy as np
from jaxtyping import Bool, Float, Num

MEASURES = {
    "volume_ml": "volume (ml)",
    "longest_mm": "longest in-plane diameter (mm)",
    "perpendicular_mm": "perpendicular diameter (mm)",
}


def measure(mask: Bool[np.ndarray, "z y x"], spacing: tuple[float, ...]) -> dict[str, float]:
    """Volume in ml, and the longest in-plane diameter of any slice with its perpendicular, in mm.

    Slices are along the first axis. Diameters are between points of the outline, which runs
    halfway between pixels inside and outside, of one connected part of one slice; the
    perpendicular is the longest chord, at right angles to the diameter, of that part's convex hull
    (RECIST 1.1's short axis, WHO's second diameter). All are 0 for an empty mask, and NaN
    where the spacing is not known.
    """
    from scipy import ndimage

    if not np.isfinite(spacing).all():
        return dict.fromkeys(MEASURES, float("nan"))
    volume = np.count_nonzero(mask) * float(np.prod(spacing)) / 1000
    best = (0.0, 0.0)
    for plane in mask[mask.any(axis=(1, 2))]:
        parts, count = ndimage.label(plane, np.ones((3, 3)))
        for part in range(1, count + 1):
            hull = _hull(parts == part, spacing[1:])
            best = max(best, diameters(hull))
    return {"volume_ml": volume, "longest_mm": best[0], "perpendicular_mm": best[1]}


def diameters(hull: Float[np.ndarray, "n 2"]) -> tuple[float, float]:
    """Longest diameter of a convex polygon, and its longest chord perpendicular to that."""
    offset = hull[:, None] - hull[None]
    distance = np.linalg.norm(offset, axis=-1)
    a, b = np.unravel_index(distance.argmax(), distance.shape)
    along = (hull[b] - hull[a]) / distance[a, b]
    across = np.array([-along[1], along[0]])
    t, u = hull @ along, hull @ across
    # A chord's length is concave and piecewise linear along the diameter: greatest at a vertex.
    return float(distance[a, b]), float(max(_chord(t, u, position) for position in t))


def _chord(t: np.ndarray, u: np.ndarray, position: float) -> float:
    """Extent in u of the polygon with vertices (t, u) on the line t = position."""
    t2, u2 = np.roll(t, -1), np.roll(u, -1)
    crosses = (np.minimum(t, t2) <= position) & (position <= np.maximum(t, t2))
    length = t2 - t
    flat = length == 0
    share = np.divide(position - t, length, out=np.zeros_like(t), where=~flat)
    at = np.concatenate([(u + share * (u2 - u))[crosses], u2[crosses & flat]])
    return float(at.max() - at.min())


def _hull(part: Bool[np.ndarray, "y x"], spacing: tuple[float, float]) -> np.ndarray:
    """Convex hull of a part's outline in mm: midpoints between pixels inside and outside."""
    from scipy.spatial import ConvexHull

    padded = np.pad(part, 1)
    points = []
    for axis in (0, 1):
        edges = np.argwhere(np.diff(padded.astype(np.int8), axis=axis)).astype(float)
        edges[:, axis] += 0.5
        points.append(edges)
    points = np.concatenate(points) * spacing
    return points[ConvexHull(points).vertices]


def agreement(measured: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How well measurements agree with the truth, both [n].

    Returns:
      n, Pearson's and Spearman's correlation, ICC(2,1) (two-way random effects, absolute
      agreement, single measurement: Shrout and Fleiss 1979), and Bland and Altman's bias (measured
      minus truth), its standard deviation and limits of agreement. NaN where n is too small (below
      3 for the correlations, which two points always fulfil), or where a side does not vary.
    """
    from scipy import stats

    n = len(truth)
    difference = measured - truth
    varies = n > 2 and np.ptp(measured) > 0 and np.ptp(truth) > 0
    deviation = float(difference.std(ddof=1)) if n > 1 else float("nan")
    bias = float(difference.mean()) if n else float("nan")
    return {
        "n": n,
        "pearson": float(stats.pearsonr(measured, truth)[0]) if varies else float("nan"),
        "spearman": float(stats.spearmanr(measured, truth)[0]) if varies else float("nan"),
        "icc": intraclass_correlation(np.stack([measured, truth], axis=1))
        if n > 2
        else float("nan"),
        "bias": bias,
        "sd": deviation,
        "lower_limit": bias - 1.96 * deviation,
        "upper_limit": bias + 1.96 * deviation,
    }


def intraclass_correlation(ratings: Num[np.ndarray, "n k"]) -> float:
    """ICC(2,1) of n targets rated by k raters; NaN for fewer than three targets or no variance."""
    n, k = ratings.shape
    if n < 3:
        return float("nan")
    mean = ratings.mean()
    rows = k * np.sum((ratings.mean(axis=1) - mean) ** 2) / (n - 1)
    columns = n * np.sum((ratings.mean(axis=0) - mean) ** 2) / (k - 1)
    total = np.sum((ratings - mean) ** 2)
    error = (total - rows * (n - 1) - columns * (k - 1)) / ((n - 1) * (k - 1))
    denominator = rows + (k - 1) * error + k * (columns - error) / n
    return float((rows - error) / denominator) if denominator > 0 else float("nan")
