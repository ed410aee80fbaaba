"""Surface length and area in one cell of the corner lattice, for each neighbour code.

Follows DeepMind's surface-distance (Nikolov et al. 2018, arXiv:1809.04430). A mask's pixels
(voxels) are points. Every 2x2 (2x2x2) block of them is a cell, and the code of a cell has one bit
per corner. The surface crosses a cell edge at its midpoint if its two ends differ. In 2D the
crossings are joined by segments. In 3D they form polygons, cut into triangles as in marching cubes.

The geometry is ambiguous in two cases, which are resolved as follows:
  * a face whose corners alternate in and out separates the kind that is the minority in its cell;
  * a polygon that is not flat is cut so that its area at unit spacing is greatest, which keeps its
    flat parts whole.
The tables are derived here; tests/parity compares them with those of the reference.
"""

from functools import lru_cache
from itertools import product

import numpy as np

Point = tuple[float, float, float]

# Corners of a cell in array order (z, y, x). Corner i is bit i of the code.
CORNERS = tuple(product((0, 1), repeat=3))


@lru_cache(maxsize=256)
def element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    """Returns the surface length [16] (two spacings) or area [256] (three), indexed by code."""
    return contour_lengths(spacing) if len(spacing) == 2 else surface_areas(spacing)


def contour_lengths(spacing: tuple[float, float]) -> np.ndarray:
    """Returns the contour length [16], indexed by code; a corner is bit 2 * row + column."""
    row, column = spacing
    diagonal = 0.5 * np.hypot(row, column)
    a, b, c, d = (np.arange(16) >> np.arange(4)[:, None]) & 1
    # A contour between an upper and a lower row (a ^ c) has the length of a column's spacing.
    even = np.array([[0.0, column], [row, 2 * diagonal]])[a ^ b, a ^ c]
    return np.where(a ^ b ^ c ^ d, diagonal, even)


def surface_areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Returns the surface area [256], indexed by code; a corner is bit 4 * z + 2 * y + x."""
    z, y, x = spacing
    scaled = triangle_area_vectors() * np.array([y * x, z * x, z * y])
    return np.linalg.norm(scaled, axis=-1).sum(axis=-1)


@lru_cache(maxsize=1)
def triangle_area_vectors() -> np.ndarray:
    """Returns area vectors [256, 4, 3] of each code's triangles at unit spacing, zero-padded."""
    vectors = np.zeros((256, 4, 3))
    for code in range(256):
        triangles = (t for polygon in _polygons(code) for t in _flattest_cut(polygon))
        for i, triangle in enumerate(triangles):
            vectors[code, i] = _area_vector(triangle)
    return vectors


def _polygons(code: int) -> list[list[Point]]:
    """Returns closed loops of edge midpoints where the surface meets the faces of the cell."""
    inside = {corner for bit, corner in enumerate(CORNERS) if code >> bit & 1}
    minority = len(inside) <= 4
    neighbours: dict[Point, list[Point]] = {}
    for axis, side in product(range(3), (0, 1)):
        for start, end in _face_segments(axis, side, inside, minority):
            neighbours.setdefault(start, []).append(end)
            neighbours.setdefault(end, []).append(start)

    loops = []
    while neighbours:
        loop, point = [], next(iter(neighbours))
        while point is not None:
            loop.append(point)
            point = next((p for p in neighbours.pop(point) if p in neighbours), None)
        loops.append(loop)
    return loops


def _face_segments(
    axis: int, side: int, inside: set[Point], minority: bool
) -> list[tuple[Point, Point]]:
    """Returns the segments on one face; with `minority`, the inside corners are separated."""
    corners = [(*uv[:axis], side, *uv[axis:]) for uv in ((0, 0), (0, 1), (1, 1), (1, 0))]
    state = [corner in inside for corner in corners]
    edges = zip(corners, corners[1:] + corners[:1], strict=True)
    midpoint = [tuple((p + q) / 2 for p, q in zip(*edge, strict=True)) for edge in edges]
    crossed = [i for i in range(4) if state[i] != state[(i + 1) % 4]]
    if len(crossed) == 2:
        return [(midpoint[crossed[0]], midpoint[crossed[1]])]
    # Alternating corners: each corner of the separated kind gets its own segment.
    return [(midpoint[i - 1], midpoint[i]) for i in range(4) if crossed and state[i] == minority]


def _flattest_cut(polygon: list[Point]) -> list[tuple[Point, Point, Point]]:
    """Returns the triangulation of a polygon with the greatest area at unit spacing."""
    cuts = _triangulations(polygon)
    return max(cuts, key=lambda cut: sum(np.linalg.norm(_area_vector(part)) for part in cut))


def _triangulations(polygon: list[Point]) -> list[list[tuple[Point, Point, Point]]]:
    """Returns all ways to cut a polygon into triangles by its diagonals."""
    if len(polygon) < 3:
        return [[]]
    return [
        [*left, (polygon[0], polygon[apex], polygon[-1]), *right]
        for apex in range(1, len(polygon) - 1)
        for left in _triangulations(polygon[: apex + 1])
        for right in _triangulations(polygon[apex:])
    ]


def _area_vector(triangle: tuple[Point, Point, Point]) -> np.ndarray:
    a, b, c = np.asarray(triangle)
    return np.cross(b - a, c - a) / 2
