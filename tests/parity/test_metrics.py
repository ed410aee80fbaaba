"""Both forms of our metrics against DeepMind's surface-distance, live, on 500 pairs."""

import importlib.util
from pathlib import Path

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

MAKER = Path(__file__).parents[1] / "golden" / "make_metrics.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_metrics", MAKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(maker):
    return maker.load_reference()


def test_numpy_form(maker, reference):
    rng = np.random.default_rng(7)
    for i in range(500):
        pred, target = maker.random_pair(rng, 2 + i % 2)
        spacing, tolerance = maker.random_spacing(rng, pred.ndim), rng.choice([0, 1, 2, 3.3, 5, 10])
        with np.errstate(invalid="ignore"):
            expected = maker.reference_scores(reference, pred, target, spacing, [tolerance])
        scores = {
            f"nsd_{tolerance:g}": normalized_surface_dice(pred, target, spacing, tolerance),
            "dice": dice(pred, target),
        }
        if "hd95" in expected:
            scores["hd95"] = hausdorff_distance(pred, target, spacing)
            scores["asd"] = average_surface_distance(pred, target, spacing)
        assert scores["dice"] == expected["dice"] or np.isnan(expected["dice"])
        assert scores == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("tolerance", [0, 1, 2, 5.5, 10])
def test_jitted_form(maker, reference, tolerance):
    rng = np.random.default_rng(8)
    pairs, spacings, expected = [], [], []
    for _ in range(100):
        pred, target = maker.random_pair(rng, 2)
        spacing = maker.random_spacing(rng, 2)
        with np.errstate(invalid="ignore"):
            scores = maker.reference_scores(reference, pred, target, spacing, [tolerance])
        padding = [(0, 72 - n) for n in pred.shape]
        pairs.append((np.pad(pred, padding), np.pad(target, padding)))
        spacings.append(spacing)
        expected.append(scores[f"nsd_{tolerance:g}"])
    pred, target = map(np.stack, zip(*pairs, strict=True))
    scores = nsd_batch(pred, target, np.stack(spacings), tolerance)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)


def test_jitted_form_of_volumes(maker, reference):
    """Padded to one shape, so that it compiles once."""
    rng = np.random.default_rng(10)
    for _ in range(100):
        pred, target = maker.random_pair(rng, 3)
        spacing, tolerance = maker.random_spacing(rng, 3), rng.choice([0, 1, 2, 3.3, 5, 10])
        with np.errstate(invalid="ignore"):
            expected = maker.reference_scores(reference, pred, target, spacing, [tolerance])
        padding = [(0, 18 - n) for n in pred.shape]
        masks = (jnp.array(np.pad(mask, padding)) for mask in (pred, target))
        score = float(normalized_surface_dice(*masks, spacing, tolerance))
        assert score == pytest.approx(expected[f"nsd_{tolerance:g}"], abs=1e-6, nan_ok=True)


def test_tables(reference):
    """Their codes read the same corners from the most significant bit down."""
    theirs = reference.lookup_tables
    rng = np.random.default_rng(9)
    for spacing in map(tuple, rng.uniform(0.3, 5, (10, 3)).tolist()):
        areas = theirs.create_table_neighbour_code_to_surface_area(spacing)
        reverse = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
        np.testing.assert_allclose(
            surface_elements.surface_areas(spacing)[reverse], areas, rtol=1e-12
        )
        lengths = theirs.create_table_neighbour_code_to_contour_length(spacing[:2])
        reverse = [int(f"{code:04b}"[::-1], 2) for code in range(16)]
        np.testing.assert_allclose(surface_elements.contour_lengths(spacing[:2])[reverse], lengths)
