"""NSD, HD95 and ASD: hand-computed cases, golden scores of surface-distance, symmetries."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.metrics import (
    average_surface_distance,
    dice,
    hausdorff_distance,
    normalized_surface_dice,
    nsd_batch,
    surface_elements,
)
from medsam_jax.metrics.surface import surface_distances

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"
FORMS = [np.asarray, jnp.asarray]


def single(shape, *positions):
    mask = np.zeros(shape, bool)
    for position in positions:
        mask[position] = True
    return mask


def disc(size, radius, centre):
    rows, columns = np.ogrid[:size, :size]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2


def golden_cases():
    arrays = np.load(GOLDEN)
    for i in range(sum(name.endswith("/pred") for name in arrays)):
        values = dict(zip(arrays[f"{i}/names"], arrays[f"{i}/values"], strict=True))
        yield arrays[f"{i}/pred"], arrays[f"{i}/target"], arrays[f"{i}/spacing"], values


def test_numpy_form_equals_the_reference_scores():
    with np.errstate(all="raise"):
        for pred, target, spacing, values in golden_cases():
            assert dice(pred, target) == pytest.approx(values.pop("dice"), abs=0, nan_ok=True)
            if "hd95" in values:
                hd95 = hausdorff_distance(pred, target, spacing)
                assert hd95 == pytest.approx(values.pop("hd95"), abs=1e-12)
                asd = average_surface_distance(pred, target, spacing)
                assert asd == pytest.approx(values.pop("asd"), abs=1e-12)
            for name, expected in values.items():
                tolerance = float(name.removeprefix("nsd_"))
                score = normalized_surface_dice(pred, target, spacing, tolerance)
                assert score == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_jitted_forms_equal_the_reference_scores():
    """Pairs are padded to one shape, so that each form compiles once."""
    flat, solid = [], []
    for pred, target, spacing, values in golden_cases():
        size = 72 if pred.ndim == 2 else 18
        padding = [(0, size - n) for n in pred.shape]
        padded = np.pad(pred, padding), np.pad(target, padding)
        (flat if pred.ndim == 2 else solid).append((*padded, spacing, values))

    pred, target, spacing, values = zip(*flat, strict=True)
    for tolerance in (0.0, 1.0, 2.0, 10.0):
        expected = [v[f"nsd_{tolerance:g}"] for v in values]
        scores = nsd_batch(np.stack(pred), np.stack(target), np.stack(spacing), tolerance)
        np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    for pred, target, spacing, values in solid:
        score = normalized_surface_dice(jnp.array(pred), jnp.array(target), spacing, 2.0)
        np.testing.assert_allclose(score, values["nsd_2"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_hand_computed_contours(form):
    """Pixels p and q of one row, four apart: a diamond around each."""
    pred, target = form(single((5, 9), (2, 2))), form(single((5, 9), (2, 6)))
    assert normalized_surface_dice(pred, target, (1, 1), 2) == 0
    # Facing sides are three columns apart, far sides four: half of each contour is within three.
    assert normalized_surface_dice(pred, target, (1, 1), 3) == pytest.approx(0.5)
    assert normalized_surface_dice(pred, target, (1, 1), 4) == 1
    assert normalized_surface_dice(pred, target, (1, 0.5), 1.5) == pytest.approx(0.5)


def test_hand_computed_distances():
    """Facing sides are three columns apart, far sides four; halves of equal length."""
    pred, target = single((5, 9), (2, 2)), single((5, 9), (2, 6))
    assert average_surface_distance(pred, target, (1, 1)) == pytest.approx(3.5)
    assert hausdorff_distance(pred, target, (1, 1)) == 4
    assert hausdorff_distance(pred, target, (1, 1), percentile=50) == 3
    assert hausdorff_distance(pred, target, (9, 0.5)) == 2, "spacing is (row, column)"
    # A far pixel is a third of one contour: it decides HD95, and no longer its 60th percentile.
    outlier = target | single((5, 9), (2, 0)) | single((5, 9), (2, 4))
    assert hausdorff_distance(target, outlier, (1, 1)) == 6
    assert hausdorff_distance(target, outlier, (1, 1), percentile=60) == 2
    assert hausdorff_distance(outlier, target, (1, 1)) == 6, "the greater of the two directions"


@pytest.mark.parametrize("form", FORMS)
def test_hand_computed_surfaces(form):
    """Two voxels, three planes apart: each surface is eight corner triangles."""
    pred, target = form(single((8, 4, 4), (2, 1, 1))), form(single((8, 4, 4), (5, 1, 1)))
    for tolerance, expected in ((1.9, 0), (2, 0.5), (2.9, 0.5), (3, 1)):
        score = normalized_surface_dice(pred, target, (1, 1, 1), tolerance)
        assert score == pytest.approx(expected)


def test_element_sizes_of_known_surfaces():
    (_, lengths), _ = surface_distances(single((1, 1), (0, 0)), single((1, 1), (0, 0)), (3, 4))
    assert lengths.sum() == pytest.approx(4 * 2.5)
    (_, areas), _ = surface_distances(np.ones((1, 1, 1)), np.ones((1, 1, 1)), (1, 1, 1))
    assert areas.sum() == pytest.approx(8 * np.sqrt(3) / 8)
    # A flat face cuts four edges of a cell: one voxel face of area y times x.
    code = sum(1 << bit for bit, corner in enumerate(surface_elements.CORNERS) if corner[0] == 1)
    assert surface_elements.surface_areas((2.0, 3.0, 5.0))[code] == pytest.approx(15)


def test_tables_are_symmetric_under_complement_and_axis_permutation():
    spacing = (0.7, 1.3, 2.9)
    areas = surface_elements.surface_areas(spacing)
    np.testing.assert_allclose(areas, areas[::-1])
    permuted = surface_elements.surface_areas((spacing[2], spacing[0], spacing[1]))
    index = {corner: bit for bit, corner in enumerate(surface_elements.CORNERS)}
    for code in range(256):
        moved = sum(
            1 << index[corner[2], corner[0], corner[1]]
            for bit, corner in enumerate(surface_elements.CORNERS)
            if code >> bit & 1
        )
        assert permuted[moved] == pytest.approx(areas[code])


def test_disc_is_scored_as_a_contour_not_as_a_slab():
    """Radius 60, moved by 6 px: 0.276; as a slab of thickness 1 it would be 0.967."""
    pred, target = disc(200, 60, (100, 106)), disc(200, 60, (100, 100))
    assert normalized_surface_dice(pred, target, (1, 1), 2) == pytest.approx(0.276, abs=5e-4)
    slab = normalized_surface_dice(pred[None], target[None], (1, 1, 1), 2)
    assert slab == pytest.approx(0.967, abs=5e-4)


def test_axis_permutation_with_permuted_spacing_changes_nothing():
    rng = np.random.default_rng(1)
    pred, target = rng.random((2, 5, 9, 14)) < 0.3
    spacing = np.array([3.0, 0.7, 1.1])
    for metric in (
        lambda p, t, s: normalized_surface_dice(p, t, s, 1.2),
        hausdorff_distance,
        average_surface_distance,
    ):
        expected = metric(pred, target, spacing)
        for order in ((2, 1, 0), (1, 2, 0)):
            permuted = pred.transpose(order), target.transpose(order), spacing[list(order)]
            assert metric(*permuted) == pytest.approx(expected, abs=1e-12)


def test_axis_permutation_of_the_jitted_forms():
    rng = np.random.default_rng(4)
    pred, target = rng.random((2, 4, 37, 70)) < 0.05
    expected = [
        normalized_surface_dice(p, t, (1.7, 0.6), 2.0) for p, t in zip(pred, target, strict=True)
    ]
    turned = pred.transpose(0, 2, 1), target.transpose(0, 2, 1)
    for masks, spacing in (((pred, target), (1.7, 0.6)), (turned, (0.6, 1.7))):
        scores = nsd_batch(*map(jnp.array, masks), spacing, 2.0)
        np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("height", [1, 31, 32, 33, 64])
def test_heights_around_a_word(height):
    rng = np.random.default_rng(height)
    pred, target = rng.random((2, height, 9)) < 0.3
    expected = normalized_surface_dice(pred, target, (1, 1), 1.5)
    score = normalized_surface_dice(jnp.array(pred), jnp.array(target), (1, 1), 1.5)
    assert score == pytest.approx(expected, abs=1e-6)


def test_search_and_distances_agree(monkeypatch):
    rng = np.random.default_rng(2)
    pred, target = rng.random((2, 6, 20, 70)) < 0.02
    searched = [normalized_surface_dice(pred, target, (2, 1, 0.7), t) for t in (0, 1, 3, 9, 1e9)]
    monkeypatch.setattr("medsam_jax.metrics.surface._SEARCH_LIMIT", 0)
    by_tree = [normalized_surface_dice(pred, target, (2, 1, 0.7), t) for t in (0, 1, 3, 9, 1e9)]
    np.testing.assert_allclose(searched, by_tree, rtol=1e-14)
    assert searched[-1] == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_empty_policy(form, shape):
    empty, full = form(np.zeros(shape, bool)), form(np.ones(shape, bool))
    spacing = (1.0,) * len(shape)
    assert np.isnan(normalized_surface_dice(empty, empty, spacing, 2))
    assert normalized_surface_dice(full, empty, spacing, 2) == 0
    assert normalized_surface_dice(empty, full, spacing, 2) == 0


@pytest.mark.parametrize("metric", [hausdorff_distance, average_surface_distance])
def test_empty_policy_of_distances(metric):
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    assert np.isnan(metric(empty, empty, (1, 1)))
    assert metric(full, empty, (1, 1)) == metric(empty, full, (1, 1)) == np.inf


def test_traced_spacing_equals_known_spacing():
    rng = np.random.default_rng(3)
    pred, target = rng.random((2, 6, 20, 40)) < 0.02
    spacing = rng.uniform(0.4, 3, (6, 2)).astype(np.float32)
    known = nsd_batch(pred, target, spacing, 2.5)
    traced = jax.jit(nsd_batch, static_argnums=3)(pred, target, spacing, 2.5)
    np.testing.assert_allclose(traced, known, atol=1e-6)
    mapped = jax.vmap(lambda p, t: normalized_surface_dice(p, t, (1, 2), 2.5))
    scores = [normalized_surface_dice(p, t, (1, 2), 2.5) for p, t in zip(pred, target, strict=True)]
    np.testing.assert_allclose(mapped(jnp.array(pred), jnp.array(target)), scores, atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "tolerance", "message"),
    [
        ((1, 1, 1), 2, r"spacing has shape \(3,\)"),
        ((1, 0), 2, "must be positive"),
        ((1, np.nan), 2, "must be positive and finite"),
        ((1, 1), -1, "tolerance is -1"),
        ((1, 1), np.nan, "tolerance is nan"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_bad_arguments_are_refused(form, spacing, tolerance, message):
    mask = form(np.ones((4, 4), bool))
    with pytest.raises(ValueError, match=message):
        normalized_surface_dice(mask, mask, spacing, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_that_differ_are_refused(form):
    with pytest.raises(ValueError, match="must be equal"):
        normalized_surface_dice(form(np.ones((4, 4))), form(np.ones((4, 5))), (1, 1), 2)
