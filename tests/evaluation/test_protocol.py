"""Prompts from masks: exact, shifted, points; the same for every run."""

import numpy as np
import pytest

from medsam_jax.evaluation.protocol import Protocol

MASK = np.zeros((40, 60), bool)
MASK[10:20, 30:35] = True


def test_exact_box():
    np.testing.assert_array_equal(Protocol().draw(MASK, (0, 1)).box, [30, 10, 34, 19])


def test_shifted_boxes_contain_the_object_and_cover_the_range():
    protocol = Protocol(box_shift=4)
    boxes = np.array([protocol.draw(MASK, (i, 1)).box for i in range(300)])
    offsets = boxes - [30, 10, 34, 19]
    assert set(offsets[:, 0]) == set(offsets[:, 1]) == {0, -1, -2, -3, -4}
    assert set(offsets[:, 2]) == set(offsets[:, 3]) == {0, 1, 2, 3, 4}


def test_draws_depend_on_seed_and_object_alone():
    one = Protocol(box_shift=9).draw(MASK, (3, 1)).box
    np.testing.assert_array_equal(one, Protocol(box_shift=9).draw(MASK, (3, 1)).box)
    assert not np.array_equal(one, Protocol(box_shift=9, seed=1).draw(MASK, (3, 1)).box)
    assert not np.array_equal(one, Protocol(box_shift=9).draw(MASK, (3, 2)).box)


@pytest.mark.parametrize(("prompt", "labels"), [("point", [1]), ("points", [1, 1, 1, 0, 0, 0])])
def test_points_lie_where_their_labels_say(prompt, labels):
    for i in range(20):
        drawn = Protocol(prompt).draw(MASK, (i, 1))
        assert drawn.labels.tolist() == labels
        columns, rows = drawn.points.astype(int).T
        np.testing.assert_array_equal(MASK[rows, columns], drawn.labels == 1)


def test_points_beside_an_object_that_fills_the_slice_are_padding():
    drawn = Protocol("points").draw(np.ones((4, 4), bool), (0, 1))
    assert drawn.labels.tolist() == [1, 1, 1, -2, -2, -2]
