"""Tumour burden: volume and RECIST/WHO diameters of a mask."""

import numpy as np
from jaxtyping import Bool, Float

MEASURES = {
    "volume_ml": "volume (ml)",
    "longest_mm": "longest in-plane diameter (mm)",
    "perpendicular_mm": "perpendicular diameter (mm)",
}


def measure(mask: Bool[np.ndarray, "z y x"], spacing: tuple[float, ...]) -> dict[str, float]:
    """Returns the volume in ml, and the longest in-plane diameter with its perpendicular in mm.

    Slices are along the first axis. Diameters are between points of the outline, which runs
    halfway between pixels inside and outside, of one connected part of one slice; the
    perpendicular is the longest chord, at right angles to the diameter, of that part's convex hull
    (RECIST 1.1's short axis, WHO's second diameter). All are 0 for an empty mask. Diameters are
    NaN where the spacing of a slice is not known, the volume where any spacing is not.
    """
    from scipy import ndimage

    if not np.isfinite(spacing[1:]).all():
        return dict.fromkeys(MEASURES, float("nan"))
    volume = np.count_nonzero(mask) * float(np.prod(spacing)) / 1000
    best = (0.0, 0.0)
    for plane in mask[mask.any(axis=(1, 2))]:
        parts, count = ndimage.label(plane, np.ones((3, 3)))
        for part in range(1, count + 1):
            best = max(best, diameters(_hull(parts == part, spacing[1:])))
    return {"volume_ml": volume, "longest_mm": best[0], "perpendicular_mm": best[1]}


def diameters(hull: Float[np.ndarray, "n 2"]) -> tuple[float, float]:
    """Returns the longest diameter of a convex polygon and its longest perpendicular chord."""
    offset = hull[:, None] - hull[None]
    distance = np.linalg.norm(offset, axis=-1)
    a, b = np.unravel_index(distance.argmax(), distance.shape)
    along = (hull[b] - hull[a]) / distance[a, b]
    across = np.array([-along[1], along[0]])
    t, u = hull @ along, hull @ across
    # A chord's length is concave and piecewise linear along the diameter: greatest at a vertex.
    return float(distance[a, b]), float(max(_chord(t, u, position) for position in t))


def _chord(t: np.ndarray, u: np.ndarray, position: float) -> float:
    """Returns the extent in u of the polygon with vertices (t, u) on the line t = position."""
    t2, u2 = np.roll(t, -1), np.roll(u, -1)
    crosses = (np.minimum(t, t2) <= position) & (position <= np.maximum(t, t2))
    length = t2 - t
    flat = length == 0
    share = np.divide(position - t, length, out=np.zeros_like(t), where=~flat)
    at = np.concatenate([(u + share * (u2 - u))[crosses], u2[crosses & flat]])
    return float(at.max() - at.min())


def _hull(part: Bool[np.ndarray, "y x"], spacing: tuple[float, float]) -> np.ndarray:
    """Returns the convex hull, in mm, of the midpoints between pixels inside and outside."""
    from scipy.spatial import ConvexHull

    padded = np.pad(part, 1)
    points = []
    for axis in (0, 1):
        edges = np.argwhere(np.diff(padded.astype(np.int8), axis=axis)).astype(float)
        edges[:, axis] += 0.5
        points.append(edges)
    points = np.concatenate(points) * spacing
    return points[ConvexHull(points).vertices]
