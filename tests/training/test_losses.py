"""Dice and cross-entropy against a plain NumPy statement of the formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.data.preprocess import valid_pixels
from medsam_jax.training.losses import cross_entropy_loss, dice_loss


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (3, 8, 8)).astype(np.float32)
    target = generator.random((3, 8, 8)) < 0.3
    valid = np.array(valid_pixels(jnp.array([[8, 8], [5, 8], [8, 3]]), 8))
    return logits, target, valid


def test_valid_pixels_cut_the_padding(batch):
    _, _, valid = batch
    assert valid[0].all()
    assert valid[1, :5].all()
    assert not valid[1, 5:].any()
    assert valid[2, :, :3].all()
    assert not valid[2, :, 3:].any()


def test_dice_has_a_squared_denominator_and_no_padding(batch):
    expected = []
    for logits, target, valid in zip(*batch, strict=True):
        p = 1 / (1 + np.exp(-logits[valid].astype(np.float64)))
        g = target[valid].astype(np.float64)
        expected.append(1 - (2 * (p * g).sum() + 1e-5) / ((p * p).sum() + (g * g).sum() + 1e-5))
    np.testing.assert_allclose(dice_loss(*map(jnp.asarray, batch)), expected, rtol=1e-5)


def test_cross_entropy_is_the_mean_over_valid_pixels(batch):
    expected = []
    for logits, target, valid in zip(*batch, strict=True):
        p = 1 / (1 + np.exp(-logits[valid].astype(np.float64)))
        g = target[valid]
        expected.append(-np.log(np.where(g, p, 1 - p)).mean())
    np.testing.assert_allclose(cross_entropy_loss(*map(jnp.asarray, batch)), expected, rtol=1e-5)


def test_a_sure_and_right_prediction_costs_nothing_a_wrong_one_everything():
    target = jnp.zeros((1, 4, 4), bool).at[0, 1:3, 1:3].set(True)
    valid = jnp.ones((1, 4, 4), bool)
    right = jnp.where(target, 40.0, -40.0)
    np.testing.assert_allclose(dice_loss(right, target, valid), 0.0, atol=1e-6)
    np.testing.assert_allclose(cross_entropy_loss(right, target, valid), 0.0, atol=1e-6)
    np.testing.assert_allclose(dice_loss(-right, target, valid), 1.0, atol=1e-5)
    np.testing.assert_allclose(cross_entropy_loss(-right, target, valid), 40.0, rtol=1e-6)
