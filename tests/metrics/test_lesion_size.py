"""Volume and diameters of phantoms of known size."""

import numpy as np
import pytest

from medsam_jax.metrics.lesion_size import diameters, measure


def ellipsoid(shape, spacing, semi_axes, angle=0.0):
    """Voxels whose centre lies in an ellipsoid (z, long, short axes) turned in plane by `angle`."""
    z, y, x = ((np.arange(n) - (n - 1) / 2 + 0.13) * s for n, s in zip(shape, spacing, strict=True))
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    along = np.cos(angle) * y + np.sin(angle) * x
    across = -np.sin(angle) * y + np.cos(angle) * x
    a, b, c = semi_axes
    return (z / a) ** 2 + (along / b) ** 2 + (across / c) ** 2 <= 1


@pytest.mark.parametrize("angle", [0, 20, 45, 77])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (2.0, 0.5, 1.2)])
def test_ellipsoid_of_known_volume_and_diameters(angle, spacing):
    semi_axes = (15.0, 22.0, 12.0)
    shape = [int(56 / s) for s in spacing]
    measured = measure(ellipsoid(shape, spacing, semi_axes, np.radians(angle)), spacing)
    volume = 4 / 3 * np.pi * np.prod(semi_axes) / 1000
    assert measured["volume_ml"] == pytest.approx(volume, rel=0.01)
    # The outline is known to half a pixel at each end.
    pixel = max(spacing[1:])
    assert measured["longest_mm"] == pytest.approx(44, abs=pixel)
    assert measured["perpendicular_mm"] == pytest.approx(24, abs=1.5 * pixel)


@pytest.mark.parametrize("tilt", [0, 25, 60])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.6, 0.9)])
def test_ellipsoid_tilted_out_of_the_plane(tilt, spacing):
    """Its largest section is through the centre: an ellipse known from the quadratic form."""
    semi_axes, angle = (14.0, 24.0, 10.0), np.radians(tilt)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    form = turn @ np.diag(np.power(semi_axes, -2.0)) @ turn.T
    shape = [int(60 / s) for s in spacing]
    grids = [(np.arange(n) - (n - 1) / 2 + 0.13) * s for n, s in zip(shape, spacing, strict=True)]
    points = np.stack(np.meshgrid(*grids, indexing="ij"), axis=-1)
    mask = np.einsum("...i,ij,...j", points, form, points) <= 1
    measured = measure(mask, spacing)
    short, long = np.sort(2 / np.sqrt(np.linalg.eigvalsh(form[1:, 1:])))
    assert measured["volume_ml"] == pytest.approx(4 / 3 * np.pi * 14 * 24 * 10 / 1000, rel=0.01)
    pixel = max(spacing[1:])
    assert measured["longest_mm"] == pytest.approx(long, abs=pixel)
    assert measured["perpendicular_mm"] == pytest.approx(short, abs=1.5 * pixel)


def test_single_voxel():
    mask = np.zeros((1, 3, 3), bool)
    mask[0, 1, 1] = True
    assert measure(mask, (5.0, 2.0, 2.0)) == pytest.approx(
        {"volume_ml": 0.02, "longest_mm": 2.0, "perpendicular_mm": 2.0}
    )


def test_parts_are_not_bridged_and_empty_is_zero():
    mask = np.zeros((2, 10, 40), bool)
    mask[0, 2:4, 2:6] = mask[0, 2:4, 30:34] = True
    one = np.zeros_like(mask)
    one[0, 2:4, 2:6] = True
    spacing = (1.0, 1.0, 1.0)
    assert measure(mask, spacing)["longest_mm"] == measure(one, spacing)["longest_mm"] < 6
    assert set(measure(np.zeros_like(mask), spacing).values()) == {0.0}


def test_unknown_spacing_gives_no_mm():
    assert np.isnan(list(measure(np.ones((1, 4, 4), bool), (np.nan,) * 3).values())).all()


def test_unknown_slice_distance_gives_diameters_and_no_volume():
    mask = np.zeros((1, 6, 8), bool)
    mask[0, 2:4, 2:6] = True
    found, known = measure(mask, (np.nan, 0.5, 0.5)), measure(mask, (1.0, 0.5, 0.5))
    assert np.isnan(found.pop("volume_ml"))
    del known["volume_ml"]
    assert found == known


def test_diameters_of_polygons():
    rectangle = np.array([[0, 0], [0, 3], [4, 3], [4, 0]], float)
    longest, perpendicular = diameters(rectangle)
    assert longest == pytest.approx(5)
    # Through the corner, at right angles to the diagonal, to the long side.
    assert perpendicular == pytest.approx(3 * 5 / 4)
    triangle = np.array([[0, 0], [10, 0], [5, 3]], float)
    assert diameters(triangle) == pytest.approx((10, 3))
