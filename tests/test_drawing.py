"""Outlines and prompts on slices: where they belong, in one colour each."""

import numpy as np

from medsam_jax.drawing import PREDICTION, PROMPT, TRUTH, overlay, window_around


def test_overlay_outlines_follow_the_masks():
    image = np.zeros((64, 48, 3), np.uint8)
    truth, prediction = np.zeros((2, 64, 48), bool)
    truth[10:20, 10:20] = True
    prediction[30:40, 10:20] = True
    picture = overlay(image, truth, prediction, np.array([5, 5, 25, 45]))
    factor = picture.shape[0] // 64
    assert picture.shape == (512, 384, 3)
    for colour, rows, columns in ((TRUTH, 10, 10), (PREDICTION, 30, 10), (PROMPT, 5, 5)):
        found = np.argwhere((picture == colour).all(axis=2))
        assert np.abs(found.min(axis=0) - [rows * factor, columns * factor]).max() <= 1
    assert not picture[15 * factor, 15 * factor].any(), "masks are outlined, not filled"
    assert not image.any(), "the image is not drawn on"


def test_overlay_takes_empty_masks_and_large_images():
    image = np.full((600, 700, 3), 9, np.uint8)
    empty = np.zeros((600, 700), bool)
    np.testing.assert_array_equal(overlay(image, empty, empty), image)


def test_window_holds_the_masks():
    masks = np.zeros((2, 100, 200), bool)
    masks[0, 5, 190] = masks[1, 25, 150] = True
    rows, columns = window_around(masks)
    assert masks[:, rows, columns].sum() == 2
    assert (rows.start, columns.stop) == (0, 200)
