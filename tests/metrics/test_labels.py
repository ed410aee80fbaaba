"""Several labels in one call: each as if alone, and ids that must be meant."""

import numpy as np
import pytest

from medsam_jax.metrics import (
    average_surface_distance,
    dice,
    hausdorff_distance,
    iou,
    label_scores,
    normalized_surface_dice,
)

SPACING = (2.0, 0.8, 0.9)


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    target = np.zeros((6, 20, 24), np.int16)
    target[1:5, 3:15, 4:18] = 300
    target[2:4, 6:9, 8:12] = 7  # nested, and touching
    target[1:5, 15:18, 4:9] = 2
    pred = np.where(rng.random(target.shape) < 0.1, 0, np.roll(target, 1, axis=2))
    pred[0, 0, 0] = 9
    return pred, target


def test_each_label_is_scored_as_if_alone(maps):
    pred, target = maps
    scores = label_scores(pred, target, (300, 2, 7), SPACING, 1.5)
    assert list(scores) == [300, 2, 7]
    for label, found in scores.items():
        masks = pred == label, target == label
        assert found == {
            "dice": dice(*masks),
            "nsd": normalized_surface_dice(*masks, SPACING, 1.5),
            "iou": iou(*masks),
            "hd95": hausdorff_distance(*masks, SPACING),
            "asd": average_surface_distance(*masks, SPACING),
        }


def test_a_label_that_is_missed_scores_zero(maps):
    _, target = maps
    scores = label_scores(np.zeros_like(target), target, [7], SPACING, 1.5)[7]
    assert (scores["dice"], scores["nsd"], scores["hd95"]) == (0, 0, np.inf)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        ([7, 9], None, r"labels \[9\] are not in target, which has \[0, 2, 7, 300\]"),
        ([7, 7], None, "each label once"),
        ([], None, "at least one"),
        ([7], lambda p, t: (p.astype(float), t), "pred is of float64"),
        ([7], lambda p, t: (p, t[:, :-1]), r"\(6, 20, 24\) and target \(6, 19, 24\)"),
    ],
)
def test_bad_input_is_refused(maps, labels, change, message):
    pred, target = change(*maps) if change else maps
    with pytest.raises(ValueError, match=message):
        label_scores(pred, target, labels, SPACING, 1.5)
