"""Filters on the device against plain NumPy over masks at full size, and suppression by hand."""

import dataclasses

import numpy as np
import pytest

from medsam_jax.data import run_lengths
from medsam_jax.data.preprocess import resized_shape, restore_masks
from medsam_jax.data.recipes import PREPROCESSING, get_recipe
from medsam_jax.inference import mask_records as records
from medsam_jax.inference.mask_filters import (
    FILTERS,
    Thresholds,
    enlargement,
    filter_masks,
    low_res_boxes,
    suppress,
)


def smooth_logits(count, side, seed=0):
    """Blobs of several sizes, some cut by the edge, between -8 and 8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    centre, radius = rng.uniform(0, 1, (count, 2, 1, 1)), rng.uniform(0.05, 0.25, (count, 1, 1))
    distance = np.hypot(y - centre[:, 0], x - centre[:, 1])
    steepness = rng.uniform(3, 60, (count, 1, 1))
    return np.clip((radius - distance) * steepness, -8, 8).astype(np.float32)


def expected_masks(logits, scores, crop_box, image_shape, preprocessing, valid_shape, thresholds):
    """The filters one mask at a time, as they are defined."""
    x0, y0, x1, y1 = crop_box
    found = []
    for index, (maps, score) in enumerate(zip(logits, scores, strict=True)):
        if score <= thresholds.predicted_iou:
            continue
        full = restore_masks(maps, valid_shape, (y1 - y0, x1 - x0), preprocessing, True)
        stability = (full > 1).sum() / max((full > -1).sum(), 1)
        mask = np.zeros(image_shape, bool)
        mask[y0:y1, x0:x1] = full > 0
        box = records.mask_box(mask)
        near_crop = np.abs(np.subtract(box, crop_box)) <= 20
        near_image = np.abs(np.subtract(box, (0, 0, image_shape[1], image_shape[0]))) <= 20
        if stability < thresholds.stability or not mask.any() or (near_crop & ~near_image).any():
            continue
        found.append((index, score, stability, box, mask))
    return found


@pytest.mark.parametrize(
    ("contract", "crop_box"),
    [
        ("lite", (0, 0, 300, 200)),
        ("lite", (60, 0, 300, 150)),
        ("sam", (0, 0, 300, 200)),
        ("v2", (0, 0, 300, 200)),
    ],
)
def test_equals_the_filters_one_by_one(contract, crop_box):
    image_shape = (200, 300)
    x0, y0, x1, y1 = crop_box
    preprocessing = PREPROCESSING[contract]
    valid_shape = resized_shape((y1 - y0, x1 - x0), get_recipe(preprocessing.recipe))
    logits = smooth_logits(72, 256)
    scores = np.random.default_rng(1).random(72).astype(np.float32)
    thresholds = Thresholds(0.3, 0.6, 1.0, 0.0)
    found = filter_masks(
        logits.reshape(24, 3, 256, 256),
        scores.reshape(24, 3),
        np.arange(24) < 23,
        enlargement(256, valid_shape, (y1 - y0, x1 - x0), preprocessing),
        np.array(crop_box, np.int32),
        np.array(image_shape, np.int32),
        thresholds,
        upsample=preprocessing.upsample,
    )
    expected = expected_masks(
        logits[:69], scores[:69], crop_box, image_shape, preprocessing, valid_shape, thresholds
    )
    assert 3 <= len(expected) < (scores[:69] > 0.3).sum()
    assert int(found.count) == len(expected)
    assert int(found.dropped.sum()) == 69 - len(expected)
    assert found.dropped[0] == (scores[:69] <= 0.3).sum()
    for i, (index, score, stability, box, mask) in enumerate(expected):
        assert found.prompts[i] == index // 3
        assert found.scores[i] == score
        assert found.stability[i] == pytest.approx(stability, abs=2e-3)
        np.testing.assert_allclose(found.boxes[i], box, atol=1)
        counts = records.encode_packed(
            np.asarray(found.packed[i]), np.asarray(found.boxes[i]), crop_box, image_shape
        )
        ours = run_lengths.decode_rle({"size": image_shape, "counts": counts})
        assert (ours & mask).sum() >= 0.999 * (ours | mask).sum()


def test_thresholds_of_zero_are_off_and_empty_masks_go():
    logits = np.stack([smooth_logits(1, 64)[0], np.full((64, 64), -9, np.float32)])
    preprocessing = dataclasses.replace(PREPROCESSING["lite"], image_size=64)
    found = filter_masks(
        logits[:, None],
        np.array([[-0.2], [0.9]], np.float32),
        np.ones(2, bool),
        enlargement(64, (256, 256), (80, 80), preprocessing),
        np.array([0, 0, 80, 80], np.int32),
        np.array([80, 80], np.int32),
        Thresholds(0.0, 0.0, 1.0, 0.0),
        upsample="logits",
    )
    assert int(found.count) == 1
    assert found.scores[0] == np.float32(-0.2)
    assert dict(zip(FILTERS, found.dropped.tolist(), strict=True)) == {
        "predicted IoU": 0,
        "stability": 0,
        "empty": 1,
        "at a crop's edge": 0,
    }


def test_low_res_boxes():
    logits = np.full((2, 8, 8), -1.0, np.float32)
    logits[0, 2:4, 5] = 1.0
    assert low_res_boxes(logits, 0.0).tolist() == [[5, 2, 6, 4], [0, 0, 0, 0]]


def test_suppression_keeps_the_best_of_each_heap():
    # IoU of the first two is 90 / 110 = 0.82, of the third with either 0.
    boxes = np.array([[0, 0, 10, 10], [0, 1, 10, 11], [20, 20, 30, 30]])
    assert suppress(boxes, np.array([0.5, 0.9, 0.1]), 0.7) == [1, 2]
    assert suppress(boxes, np.array([0.5, 0.9, 0.1]), 0.85) == [1, 0, 2]
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.7) == []


def test_suppression_of_many():
    """A chain: what a suppressed box would have suppressed stays; equal scores in given order."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (300, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 30, (300, 2))], axis=1)
    boxes = boxes.astype(np.float32)
    scores = rng.integers(0, 20, 300) / 20
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if all(box_iou(boxes[i], boxes[j]) <= 0.5 for j in kept):
            kept.append(int(i))
    assert suppress(boxes, scores, 0.5) == kept


def box_iou(a, b):
    overlap = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap)
