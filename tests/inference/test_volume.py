"""VolumePredictor: which slices are asked with which boxes, where it stops, bad input."""

import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.inference.volume import VolumePredictor, clean


class Threshold(VolumePredictor):
    """Answers a box with the bright pixels in it, so that what follows is plain to see."""

    def __init__(self, **settings):
        self.asked: dict[int, list[float]] = {}
        self.score = lambda index: 0.9
        self.predictor = None
        for name, value in {
            "elongation": None,
            "margin": 2,
            "least_score": 0.6,
            "least_overlap": 0.5,
            "most_growth": 2.0,
            **settings,
        }.items():
            setattr(self, name, value)
        self._prompts, self._encoded = {}, {}

    def set_volume(self, volume, spacing=(1, 1, 1)):
        self._slices, self._spacing = volume, np.array(spacing)

    def _predict(self, index, prompt):
        x0, y0, x1, y1 = np.asarray(prompt["box"]).astype(int)
        self.asked[index] = [float(v) for v in prompt["box"]]
        mask = np.zeros(self._slices.shape[1:], bool)
        mask[y0 : y1 + 1, x0 : x1 + 1] = self._slices[index, y0 : y1 + 1, x0 : x1 + 1] > 0
        return mask, self.score(index)


def cone(sizes) -> np.ndarray:
    """A square object, one half-size per slice; 0 where it is absent."""
    volume = np.zeros((len(sizes), 40, 50), np.uint8)
    for index, half in enumerate(sizes):
        if half:
            volume[index, 20 - half : 20 + half, 25 - half : 25 + half] = 200
    return volume


def test_propagation_follows_the_object_to_its_ends():
    volume = cone([0, 3, 5, 7, 8, 7, 6, 0, 0, 4])
    predictor = Threshold()
    predictor.set_volume(volume)
    predictor.add_prompt(4, box=[17, 12, 32, 27])
    mask, scores = predictor.propagate()
    expected = volume > 0
    expected[9] = False  # another object behind a gap
    np.testing.assert_array_equal(mask, expected)
    assert np.isfinite(scores).tolist() == [False] + [True] * 6 + [False] * 3
    assert predictor.asked[3] == [16, 11, 33, 28]  # the neighbour's box, and that 2 larger


def test_a_wide_box_stays_as_wide_and_follows_slowly():
    predictor = Threshold(margin=0)
    predictor.set_volume(cone([8, 8, 4, 4]))
    predictor.add_prompt(1, box=[14, 9, 35, 30])  # the mask's is [17, 12, 32, 27]
    predictor.propagate()
    assert predictor.asked[2] == [14, 9, 35, 30]
    assert predictor.asked[3] == [16, 11, 33, 28]  # the new mask's box stands at [21, 16, 28, 23]


def test_propagation_stops_where_the_model_doubts():
    predictor = Threshold()
    predictor.set_volume(cone([6] * 7))
    predictor.score = lambda index: 0.9 if index < 5 else 0.3
    predictor.add_prompt(3, box=[19, 14, 30, 25])
    mask, _ = predictor.propagate()
    assert mask.any(axis=(1, 2)).tolist() == [True] * 5 + [False] * 2


def test_propagation_stops_where_masks_leak_or_jump():
    volume = cone([3, 3, 3, 3])
    volume[2, 10:30, 15:35] = 200  # leaks over the whole box grown by the margin
    predictor = Threshold(margin=9)
    predictor.set_volume(volume)
    predictor.add_prompt(1, box=[22, 17, 27, 22])
    mask, _ = predictor.propagate()
    assert mask.any(axis=(1, 2)).tolist() == [True, True, False, False]
    volume[2] = 0
    volume[2, 23:29, 28:34] = 200  # beside the object, not on it
    mask, _ = predictor.propagate()
    assert mask.any(axis=(1, 2)).tolist() == [True, True, False, False]


def test_propagation_ends_where_an_object_of_that_elongation_does():
    """A bright column has no end that the model could see."""
    predictor = Threshold(elongation=1.5)
    predictor.set_volume(cone([6] * 19), spacing=(2, 1, 1))
    predictor.add_prompt(9, box=[19, 14, 30, 25])  # 12 wide: 18 mm long, 4.5 slices to each side
    mask, scores = predictor.propagate()
    assert np.flatnonzero(np.isfinite(scores)).tolist() == list(range(5, 14))
    areas = mask.sum(axis=(1, 2))
    assert areas[9] == 144
    assert (np.diff(areas[9:14]) <= 0).all()  # it tapers
    np.testing.assert_array_equal(areas[5:10], areas[13:8:-1])
    assert areas[13] < 0.5 * areas[9]
    predictor.elongation = None
    assert np.isfinite(predictor.propagate()[1]).all()  # runs on over the whole volume


def test_sides_are_geometric_means_with_the_ellipsoid():
    predictor = Threshold(elongation=2.0, margin=0)
    predictor.set_volume(cone([8] * 5))
    predictor.add_prompt(0, box=[17, 15, 32, 24])  # 16 x 10: 16 slices to each side
    predictor.propagate()
    taper = np.sqrt(1 - (np.arange(5) / 16) ** 2)
    width, height = 16 * np.sqrt(taper[1]), 10 * np.sqrt(taper[1])
    x, y = (width - 1) / 2, (height - 1) / 2
    np.testing.assert_allclose(
        predictor.asked[1], [24.5 - x, 19.5 - y, 24.5 + x, 19.5 + y], rtol=1e-6
    )


def test_nothing_tapers_between_prompts():
    predictor = Threshold(elongation=1.0, margin=0)
    predictor.set_volume(cone([3] * 14))
    for index in (2, 11):
        predictor.add_prompt(index, box=[22, 17, 27, 22])  # 3 slices to each side
    mask, scores = predictor.propagate()
    assert np.flatnonzero(np.isfinite(scores)).tolist() == list(range(14))
    assert (mask.sum(axis=(1, 2))[2:12] == 36).all()
    predictor.clear_prompts()
    predictor.add_prompt(2, box=[22, 17, 27, 22])
    assert np.flatnonzero(np.isfinite(predictor.propagate()[1])).tolist() == list(range(5))


@pytest.mark.parametrize("order", [(0, 4), (4, 0)])
def test_slices_between_prompts_are_answered_from_the_nearer_one(order):
    """The lower prompt decides half-way; the order of the prompts has no effect."""
    boxes = {0: [17, 12, 32, 27], 4: [12, 12, 37, 27]}  # on the object, and 5 wider at both sides
    predictor = Threshold(margin=0)
    predictor.set_volume(cone([8] * 5))
    for index in order:
        predictor.add_prompt(index, box=boxes[index])
    predictor.propagate()
    assert predictor.asked == {index: boxes[0 if index < 3 else 4] for index in range(5)}


@pytest.mark.parametrize("order", [(0, 4), (4, 0)])
def test_where_the_nearer_prompt_loses_the_object_the_other_answers(order):
    volume = cone([3, 8, 8, 8, 8])
    predictor = Threshold(margin=9)
    predictor.set_volume(volume)
    for index in order:
        predictor.add_prompt(index, box=[[22, 17, 27, 22], [17, 12, 32, 27]][index // 4])
    mask, scores = predictor.propagate()
    np.testing.assert_array_equal(mask, volume > 0)
    assert np.isfinite(scores).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("spacing", [(1, 1), (1, 0, 1), (1, np.nan, 1), 2.0])
def test_bad_spacing(compiled_predictor, spacing):
    with pytest.raises(UserError, match="spacing: .*give mm between slices, rows and columns"):
        VolumePredictor(compiled_predictor).set_volume(np.ones((3, 4, 5)), "CT", spacing=spacing)


def test_interpolation_between_key_slices():
    predictor = Threshold()
    predictor.set_volume(cone([8] * 6))
    predictor.add_prompt(1, box=[10, 10, 20, 20])
    predictor.add_prompt(4, box=[16, 13, 32, 23])
    mask, scores = predictor.interpolate()
    assert sorted(predictor.asked) == [1, 2, 3, 4]
    np.testing.assert_allclose(predictor.asked[2], [12, 11, 24, 21])
    assert np.isnan(scores[[0, 5]]).all()
    assert not mask[[0, 5]].any()


def test_volume_equals_slices_one_by_one(compiled_predictor, predictor):
    """Through a real model: limits of the whole volume, embeddings in batches."""
    volume = np.random.default_rng(0).normal(100, 30, (3, 40, 50))
    volume[1] *= 2
    of_volume = VolumePredictor(compiled_predictor)
    of_volume.set_volume(volume, "MR")
    of_volume.add_prompt(1, box=[5, 5, 30, 30])
    mask, scores = of_volume.predict_slices()
    single = predictor
    single.set_normalised([single.normalise(volume.reshape(-1, 50), "MR").reshape(3, 40, 50)[1]])
    expected, score, _ = single.predict(box=[5, 5, 30, 30], multimask_output=False)
    assert (mask[1] != expected[0]).mean() < 1e-3  # batches of 3 and of 1 round differently
    assert scores[1] == pytest.approx(float(score[0]), abs=1e-5)
    assert not mask[[0, 2]].any()


def test_embeddings_are_kept(compiled_predictor, tmp_path):
    volume = np.random.default_rng(0).normal(100, 30, (3, 40, 50))
    first, again = (VolumePredictor(compiled_predictor, batch_size=1) for _ in range(2))
    for predictor in (first, again):
        predictor.set_volume(volume, "MR")
        predictor.add_prompt(1, box=[5, 5, 30, 30])
    with pytest.raises(UserError, match="no slice is encoded; predict first"):
        first.save_embeddings(tmp_path / "volume.npz")
    mask, scores = first.predict_slices()
    first.save_embeddings(tmp_path / "volume.npz")
    again.load_embeddings(tmp_path / "volume.npz")
    assert list(again._encoded) == [1]
    repeated, repeated_scores = again.predict_slices()
    np.testing.assert_array_equal(repeated, mask)
    np.testing.assert_array_equal(repeated_scores, scores)
    again.set_volume(volume[:2], "MR")
    with pytest.raises(UserError, match="volume.npz: made of another volume"):
        again.load_embeddings(tmp_path / "volume.npz")


def test_clean_of_a_picture_fills_in_two_dimensions():
    ring = np.zeros((1, 9, 9), bool)
    ring[0, 2:7, 2:7] = True
    full = ring.copy()
    ring[0, 4, 4] = False
    ring[0, 0, 0] = full[0, 0, 0] = True
    np.testing.assert_array_equal(clean(ring, largest=False), full)
    np.testing.assert_array_equal(clean(ring, largest=True, holes=False), ring & (np.arange(9) > 0))


def test_clean_keeps_the_largest_and_fills_it():
    mask = np.zeros((7, 9, 9), bool)
    mask[1:6, 1:6, 1:6] = True
    whole = mask.copy()
    mask[3, 3, 3] = False
    mask[0, 8, 8] = True
    np.testing.assert_array_equal(clean(mask), whole)
    assert not clean(np.zeros((3, 4, 5), bool)).any()


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    predictor = Threshold()
    predictor._slices = None
    with pytest.raises(UserError, match="no volume is set"):
        predictor.add_prompt(0, box=[0, 0, 1, 1])
    predictor.set_volume(cone([1, 1]))
    with pytest.raises(UserError, match="no prompt is given"):
        predictor.propagate()
    with pytest.raises(UserError, match="slice 2: the volume has slices 0 to 1"):
        predictor.add_prompt(2, box=[0, 0, 1, 1])
    with pytest.raises(UserError, match="slice 0.5: the volume has slices 0 to 1"):
        predictor.add_prompt(0.5, box=[0, 0, 1, 1])
    with pytest.raises(UserError, match="is inverted"):
        predictor.add_prompt(0, box=[9, 9, 1, 1])
    with pytest.raises(UserError, match="of several objects"):
        predictor.add_prompt(0, box=[[0, 0, 1, 1], [2, 2, 3, 3]])
    predictor.add_prompt(0, point_coords=[[3, 3]], point_labels=[1])
    with pytest.raises(UserError, match="boxes on two slices"):
        predictor.interpolate()


def test_a_box_may_have_an_axis_of_prompts():
    masks = []
    for key in ([2, 2, 20, 20], [[2, 2, 20, 20]]):
        predictor = Threshold()
        predictor.set_volume(cone([5, 6, 7]))
        predictor.add_prompt(0, box=key)
        predictor.add_prompt(2, box=[1, 1, 22, 22])
        masks.append(predictor.interpolate()[0])
    assert masks[0].any()
    np.testing.assert_array_equal(*masks)
