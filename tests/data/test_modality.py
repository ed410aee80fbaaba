"""Values that are not those of their modality: a warning for CT, the right grey levels for MR."""

import numpy as np
import pytest

from medsam_jax.data.modality import doubts, foreground
from medsam_jax.data.preprocess import intensity_limits, normalise_intensity
from medsam_jax.data.recipes import RECIPES

LITE = RECIPES["lite"]


def hu(seed=0):
    """A body of 40 HU with a lesion of 120 in air."""
    y, x = np.indices((200, 240))
    body = ((y - 100) / 90) ** 2 + ((x - 120) / 110) ** 2 <= 1
    lesion = ((y - 80) / 30) ** 2 + ((x - 140) / 40) ** 2 <= 1
    noise = np.random.default_rng(seed).normal(0, 8, body.shape)
    return (np.where(body, 40, -1000) + np.where(lesion, 80, 0) + noise)[None].round()


def padded(volume, value):
    volume = volume.copy()
    volume[..., :20] = value
    return volume


def z_scored(volume):
    return (volume - volume.mean()) / volume.std()


@pytest.mark.parametrize(
    "volume",
    [
        hu(),
        hu().clip(-1024, 3071),
        padded(hu(), -2000),
        padded(hu(), -2048),
        padded(hu(), -3024),
        padded(hu(), -32768),
        hu()[:, 20:90, :160],
    ],
)
def test_hounsfield_units_are_not_doubted(volume):
    assert doubts(volume.astype(np.int16), "CT", LITE) == []
    assert doubts(volume.astype(np.float32), "ct", RECIPES["v2"]) == []


@pytest.mark.parametrize(
    ("volume", "found"),
    [
        (hu() + 1024, "a CT with a fifth of its values above 800 (-"),
        ((hu() + 1024).clip(0), "a CT without a negative value (0 to"),
        (padded((hu() + 1024).clip(0), -2000), "a CT without a negative value but padding (-2000"),
        (padded(hu() + 1024, -3024), "a CT without a negative value but padding (-3024"),
        (hu() + 32768, "a CT without a negative value (31"),
        (hu() - 1024, "a CT without a value above 0"),
        (((hu() + 160) / 400).clip(0, 1), "a CT without a negative value (0 to"),
        ((hu() / 1000).clip(-1, 1), "a CT of a range below 100 (-1 to"),
        (z_scored(hu()), "a CT of a range below 100"),
        ((hu() / 10).astype(np.uint8), "a CT in 8 bits"),
    ],
)
def test_other_values_are_doubted(volume, found):
    (sentence,) = doubts(volume, "CT", LITE)
    assert sentence.startswith(found)
    assert doubts(abs(volume), "MR", LITE) == []


def mr():
    volume = np.zeros((8, 60, 60))
    volume[:, 10:50, 10:50] = np.random.default_rng(0).gamma(5, 100, (8, 40, 40))
    return volume


def z_scored_inside(volume):
    """nnU-Net's way: the background stays 0."""
    inside = volume[volume > 0]
    return np.where(volume > 0, (volume - inside.mean()) / inside.std(), 0)


@pytest.mark.parametrize("recipe", ["lite", "v2", "sam", "v1"])
@pytest.mark.parametrize(
    ("change", "background"),
    [
        (z_scored, None),
        (z_scored_inside, 0.0),
        (lambda volume: volume - 500, -500.0),
        (lambda volume: volume - volume.max() - 1, None),
    ],
)
def test_a_scan_with_negative_values_has_the_same_grey_levels(recipe, change, background):
    settings = RECIPES[recipe]
    changed = change(mr())
    expected = normalise_intensity(mr(), "MR", settings).astype(int)
    if recipe == "v1" and change is z_scored_inside:
        return  # v1 has no background: its percentiles are of all voxels
    found = normalise_intensity(changed, "MR", settings).astype(int)
    assert np.abs(found - expected).max() <= 1
    limits = intensity_limits(changed, "MR", settings)
    part = normalise_intensity(changed[2], "MR", settings, limits=limits)
    np.testing.assert_array_equal(part, found[2])
    if recipe == "v1":
        assert doubts(changed, "MR", settings) == []
        return
    (sentence,) = doubts(changed, "MR", settings)
    assert "of the values are negative" in sentence
    assert limits.background == (changed.min() if background is None else background)


def test_ringing_below_zero_changes_nothing():
    volume = mr() + np.random.default_rng(1).normal(0, 3, mr().shape)
    voxels, background = foreground(volume)
    np.testing.assert_array_equal(voxels, volume[volume > 0])
    assert background == 0.0
    assert doubts(volume, "MR", LITE) == []


def test_a_scan_without_background_uses_all_voxels():
    volume = z_scored(np.random.default_rng(0).gamma(5, 100, (4, 30, 30)))
    limits = intensity_limits(volume, "MR", LITE)
    assert limits[:2] == tuple(np.percentile(volume, (0.5, 99.5)))
    assert limits.background is None
