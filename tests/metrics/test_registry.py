"""The rows of the metrics: what each says of itself, and that both forms agree."""

import jax
import numpy as np
import pytest

from medsam_jax.metrics import METRICS, Metric, mask_scores, registry

SPACING, TOLERANCE = (1.0, 1.0), 1.5


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.batch])
def test_jitted_form_equals_the_numpy_form(name):
    rng = np.random.default_rng(0)
    pred, target = rng.random((2, 4, 20, 30)) < 0.1
    pred[3] = target[3] = False
    batch = jax.jit(lambda p, t: METRICS[name].batch(p, t, SPACING, TOLERANCE))(pred, target)
    expected = [
        mask_scores(p, t, SPACING, TOLERANCE)[name] for p, t in zip(pred, target, strict=True)
    ]
    np.testing.assert_allclose(batch, expected, atol=1e-6)
    assert np.isnan(batch[3])


def test_better_masks_score_better():
    target = np.zeros((40, 40), bool)
    target[10:30, 10:30] = True
    near, far = np.roll(target, 2, axis=0), np.roll(target, 8, axis=0)
    good, bad = (mask_scores(mask, target, SPACING, TOLERANCE) for mask in (near, far))
    for name, metric in METRICS.items():
        assert (good[name] > bad[name]) != metric.is_length, name


def test_titles_name_what_numbers_depend_on():
    titles = [metric.title(2.0, "mm") for metric in METRICS.values()]
    assert titles == ["DSC", "NSD (2 mm)", "IoU", "HD95 (mm)", "ASD (mm)"]


def test_one_row_adds_a_metric(monkeypatch):
    def error(masks):
        return abs(np.count_nonzero(masks.pred) / np.count_nonzero(masks.target) - 1)

    row = Metric("volume_error", "volume error", error)
    monkeypatch.setitem(registry.METRICS, row.name, row)
    target = np.arange(16).reshape(4, 4) < 8
    assert mask_scores(target[:, ::-1] & (np.arange(4) < 3), target, SPACING, 1.0)[row.name] == 0.25
