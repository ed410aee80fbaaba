"""Boxes and points drawn from masks: exact values, bounds and distributions."""

import numpy as np
import pytest
from scipy import stats

from medsam_jax.data import prompts


def grid(size=64):
    rows, columns = np.mgrid[:size, :size]
    return rows - size / 2, columns - size / 2


def crescent():
    y, x = grid()
    return (x**2 + y**2 < 28**2) & ((x - 10) ** 2 + y**2 > 26**2)


def ring():
    y, x = grid()
    return (x**2 + y**2 < 28**2) & (x**2 + y**2 > 25**2)


def two_blobs():
    y, x = grid()
    return ((x - 20) ** 2 + (y - 20) ** 2 < 36) | ((x + 20) ** 2 + (y + 20) ** 2 < 36)


def diagonal_band():
    y, x = grid()
    return np.abs(x - y) < 1.5


@pytest.mark.parametrize("shape", [crescent, ring, two_blobs, diagonal_band])
def test_points_are_always_inside(shape):
    mask = shape()
    points = prompts.sample_points(mask, 500, np.random.default_rng(0)).astype(int)
    assert mask[points[:, 1], points[:, 0]].all()


def test_points_are_uniform_over_the_object():
    mask = two_blobs()
    rng = np.random.default_rng(1)
    drawn = np.concatenate([prompts.sample_points(mask, 5, rng) for _ in range(4000)]).astype(int)
    counts = np.zeros(mask.shape)
    np.add.at(counts, (drawn[:, 1], drawn[:, 0]), 1)
    assert stats.chisquare(counts[mask]).pvalue > 1e-3


def test_points_do_not_repeat_while_there_are_pixels():
    mask = np.zeros((5, 5), bool)
    mask[2, 1:5] = True
    points = prompts.sample_points(mask, 4, np.random.default_rng(0))
    assert sorted(points.tolist()) == [[1, 2], [2, 2], [3, 2], [4, 2]]
    assert len(prompts.sample_points(mask, 9, np.random.default_rng(0))) == 9


def test_box_is_the_extreme_pixels():
    mask = np.zeros((20, 30), bool)
    mask[3, 7] = mask[11, 25] = True
    assert prompts.box_from_mask(mask).tolist() == [7, 3, 25, 11]
    mask[:] = False
    mask[19, 29] = True
    assert prompts.box_from_mask(mask).tolist() == [29, 19, 29, 19]


def test_empty_masks_are_refused():
    with pytest.raises(ValueError, match="empty"):
        prompts.box_from_mask(np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="empty"):
        prompts.sample_points(np.zeros((4, 4), bool), 1, np.random.default_rng(0))


@pytest.mark.parametrize("jitter", [5, 19, 20])
def test_jitter_is_uniform_and_outward(jitter):
    box = np.array([100, 90, 140, 150], np.float32)
    rng = np.random.default_rng(2)
    drawn = np.array([prompts.jitter_box(box, jitter, (256, 256), rng) for _ in range(6000)])
    moved = (drawn - box) * [-1, -1, 1, 1]
    assert moved.min() == 0
    assert moved.max() == jitter
    for side in moved.T:
        assert stats.chisquare(np.bincount(side.astype(int), minlength=jitter + 1)).pvalue > 1e-3
    assert np.abs(np.corrcoef(moved.T) - np.eye(4)).max() < 0.06  # sides move independently


def test_jitter_stays_in_the_valid_part():
    rng = np.random.default_rng(3)
    box = np.array([1, 2, 98, 47], np.float32)
    for _ in range(200):
        left, top, right, bottom = prompts.jitter_box(box, 20, (50, 100), rng)
        assert 0 <= left <= 1
        assert 0 <= top <= 2
        assert 98 <= right <= 99
        assert 47 <= bottom <= 49


def test_no_jitter_is_exact():
    box = np.array([1, 2, 98, 47], np.float32)
    found = prompts.jitter_box(box, 0, (50, 100), np.random.default_rng(0))
    np.testing.assert_array_equal(found, box)


def test_points_on_and_beside_an_object():
    mask = ring()
    points, labels = prompts.draw_points(mask, 3, 2, np.random.default_rng(4))
    assert labels.tolist() == [1, 1, 1, 0, 0]
    columns, rows = points.astype(int).T
    np.testing.assert_array_equal(mask[rows, columns], labels == 1)
    prompts.keep_points(labels, 1, 0)
    assert labels.tolist() == [1, -2, -2, -2, -2]
    _, labels = prompts.draw_points(np.ones((4, 4), bool), 1, 2, np.random.default_rng(4))
    assert labels.tolist() == [1, prompts.PADDING_LABEL, prompts.PADDING_LABEL]


def test_a_seed_gives_the_same_prompts_in_every_version():
    """Scores of earlier evaluations stay comparable."""
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:35] = True
    points, _ = prompts.draw_points(mask, 2, 2, np.random.default_rng([0, 7, 1]))
    assert points.tolist() == [[34, 18], [33, 11], [0, 0], [54, 24]]
    box = prompts.jitter_box(
        prompts.box_from_mask(mask), 9, (40, 60), np.random.default_rng([0, 7, 1])
    )
    assert box.tolist() == [21, 9, 43, 19]
