"""Packed crops, boxes, clean-up, crops and grids: cases worked out by hand."""

import numpy as np
import pytest

from medsam_jax.data import run_lengths
from medsam_jax.inference import mask_records as records


@pytest.mark.parametrize("crop_box", [(0, 0, 30, 21), (4, 5, 17, 19)])
def test_run_lengths_of_packed_crops(crop_box):
    x0, y0, x1, y1 = crop_box
    mask = np.zeros((21, 30), bool)
    mask[y0:y1, x0:x1] = np.random.default_rng(0).random((y1 - y0, x1 - x0)) < 0.4
    mask[y0, x0] = mask[y1 - 1, x1 - 1] = True
    columns = np.zeros((32, 24), bool)
    columns[: x1 - x0, : y1 - y0] = mask[y0:y1, x0:x1].T
    packed = np.packbits(columns, axis=1)
    counts = records.encode_packed(packed, records.mask_box(mask), crop_box, mask.shape)
    assert counts.tolist() == run_lengths.encode_rle(mask)["counts"]


def test_mask_box():
    mask = np.zeros((5, 7), bool)
    assert records.mask_box(mask) == (0, 0, 0, 0)
    mask[1:3, 4] = True
    assert records.mask_box(mask) == (4, 1, 4, 2)


def test_small_regions():
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8] = True
    mask[3, 3] = False  # a hole of one pixel
    mask[10, 10] = True  # an island of one pixel
    cleaned, changed = records.remove_small_regions(mask, 2)
    expected = np.zeros((12, 12), bool)
    expected[1:8, 1:8] = True
    np.testing.assert_array_equal(cleaned, expected)
    assert changed
    assert not records.remove_small_regions(expected, 2)[1]
    lonely = np.zeros((12, 12), bool)
    lonely[0, 0] = lonely[5, 5:7] = True
    cleaned, _ = records.remove_small_regions(lonely, 5)
    assert np.argwhere(cleaned).tolist() == [[5, 5], [5, 6]]  # the largest stays


def test_crops_cover_the_image_and_overlap():
    boxes = records.crop_boxes((100, 150), 1, 0.3)
    assert boxes[0] == ((0, 0, 150, 100), 0)
    assert len(boxes) == 5
    # overlap int(0.3 * 100) = 30; crops of (150 + 30) / 2 by (100 + 30) / 2
    assert [box for box, _ in boxes[1:]] == [
        (0, 0, 90, 65),
        (0, 35, 90, 100),
        (60, 0, 150, 65),
        (60, 35, 150, 100),
    ]


def test_grids():
    np.testing.assert_allclose(
        records.point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    )
    boxes = records.box_grid((100, 150), (1.0, 0.5))
    np.testing.assert_allclose(boxes[:2], [[0, 0, 99, 99], [50, 0, 149, 99]])
    assert boxes.min() == 0
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (149, 99)
    small = boxes[2:]
    assert len(small) == 5 * 3  # half a box apart at most
    np.testing.assert_allclose(np.unique(small[:, 0]), [0, 25, 50, 75, 100])
