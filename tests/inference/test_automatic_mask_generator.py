"""Automatic masks: which weights get boxes, filters, crops, outputs, bad parameters."""

import weakref

import jax
import numpy as np
import pytest

from medsam_jax.data import run_lengths
from medsam_jax.errors import UserError
from medsam_jax.inference import mask_records as records
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator

OPEN = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def test_box_trained_weights_get_boxes(compiled_predictor, image):
    generator = AutomaticMaskGenerator(
        compiled_predictor, **OPEN, box_sides=(0.5,), box_nms_thresh=1.0
    )
    answers = generator.generate(image)
    assert answers
    for answer in answers:
        mask = answer["segmentation"]
        assert mask.shape == (60, 90)
        assert answer["area"] == mask.sum() > 0
        x, y, width, height = answer["bbox"]
        assert records.mask_box(mask) == (x, y, x + width - 1, y + height - 1)
        assert answer["crop_box"] == [0, 0, 90, 60]
        assert "prompt_box" in answer
    asked = {tuple(answer["prompt_box"][0]) for answer in answers}
    assert asked <= set(map(tuple, records.box_grid((60, 90), (0.5,))))


def test_boxes_follow_their_masks(compiled_predictor, image, monkeypatch):
    """The second prompt is the box of the first one's mask, to a low-resolution pixel."""
    module = "medsam_jax.inference.automatic_mask_generator"
    monkeypatch.setattr(f"{module}._LEAST_IOU_TO_FOLLOW", -np.inf)
    settings = OPEN | {"box_sides": (1.0,), "box_nms_thresh": 1.0}
    generator = AutomaticMaskGenerator(compiled_predictor, box_rounds=1, **settings)
    [first] = records.box_grid((60, 90), (1.0,))[:1]
    predictor = compiled_predictor.of(compiled_predictor)
    predictor.set_image(image)
    [mask], _, _ = predictor.predict(box=first, multimask_output=False)
    expected = records.mask_box(mask)
    asked = [answer["prompt_box"][0] for answer in generator.generate(image)]
    assert asked
    assert min(np.abs(np.subtract(box, expected)).max() for box in asked) <= 90 / 64


def test_default_thresholds_by_prompt(compiled_predictor):
    by_points = AutomaticMaskGenerator(
        compiled_predictor, prompts="points", stability_score_thresh=0.5
    )
    assert (by_points.pred_iou_thresh, by_points.stability_score_thresh) == (0.88, 0.5)
    by_boxes = AutomaticMaskGenerator(compiled_predictor)
    assert (by_boxes.pred_iou_thresh, by_boxes.stability_score_thresh) == (0.8, 0.8)


def test_medical_preset_may_be_changed(compiled_predictor):
    preset = AutomaticMaskGenerator.medical(compiled_predictor)
    changed = AutomaticMaskGenerator.medical(compiled_predictor, pred_iou_thresh=0.5, box_rounds=1)
    assert preset.prompts == changed.prompts == "boxes"
    assert (preset.pred_iou_thresh, preset.box_nms_thresh, preset.box_rounds) == (0.75, 0.3, 0)
    assert (changed.pred_iou_thresh, changed.box_nms_thresh, changed.box_rounds) == (0.5, 0.3, 1)


def test_points_and_crops(compiled_predictor, image):
    generator = AutomaticMaskGenerator(
        compiled_predictor,
        points_per_side=3,
        prompts="points",
        crop_n_layers=1,
        box_nms_thresh=1.0,
        **OPEN,
    )
    answers = generator.generate(image)
    for answer in answers:
        [[x, y]] = answer["point_coords"]
        left, top, width, height = answer["crop_box"]
        assert left <= x < left + width
        assert top <= y < top + height


def test_filters_only_take_away(compiled_predictor, image, monkeypatch):
    decode = AutomaticMaskGenerator._decode

    def decode_below_one(self, crop, batch):  # the random weights predict 1.2 to 2
        logits, predicted_iou = decode(self, crop, batch)
        return logits, predicted_iou / 2

    monkeypatch.setattr(AutomaticMaskGenerator, "_decode", decode_below_one)
    settings = {"box_sides": (0.5,), "box_nms_thresh": 1.0}
    everything = AutomaticMaskGenerator(compiled_predictor, **settings, **OPEN).generate(image)
    ious = sorted(answer["predicted_iou"] for answer in everything)
    middle = ious[len(ious) // 2]
    strict = AutomaticMaskGenerator(
        compiled_predictor, pred_iou_thresh=middle, stability_score_thresh=0.0, **settings
    ).generate(image)
    assert len(strict) == sum(answer["predicted_iou"] > middle for answer in everything)
    settings |= OPEN | {"stability_score_thresh": 1.0, "stability_score_offset": 1e6}
    assert AutomaticMaskGenerator(compiled_predictor, **settings).generate(image) == []


def test_outputs_hold_the_same_masks(compiled_predictor, image):
    settings = {"box_sides": (0.5,), "box_nms_thresh": 0.9, **OPEN}

    def generate(output_mode):
        return AutomaticMaskGenerator(
            compiled_predictor, output_mode=output_mode, **settings
        ).generate(image)

    masks = [answer["segmentation"] for answer in generate("binary_mask")]
    runs = [answer["segmentation"] for answer in generate("uncompressed_rle")]
    coco = [answer["segmentation"] for answer in generate("coco_rle")]
    labels = generate("label_map")
    for mask, rle, compressed in zip(masks, runs, coco, strict=True):
        np.testing.assert_array_equal(run_lengths.decode_rle(rle), mask)
        assert run_lengths.compress_rle(rle) == compressed
    assert labels.shape == (60, 90)
    np.testing.assert_array_equal(labels > 0, np.any(masks, axis=0))
    smallest = min(masks, key=np.sum)
    assert (labels[smallest] == len(masks)).all()


def test_a_label_map_needs_one_mask_at_a_time(compiled_predictor, image, monkeypatch):
    decode, decoded = run_lengths.decode_rle, []

    def spy(rle):
        assert not any(reference() is not None for reference in decoded)
        mask = decode(rle)
        decoded.append(weakref.ref(mask))
        return mask

    module = "medsam_jax.inference.automatic_mask_generator"
    monkeypatch.setattr(f"{module}.decode_rle", spy)
    labels = AutomaticMaskGenerator(
        compiled_predictor, output_mode="label_map", box_sides=(0.5,), box_nms_thresh=1.0, **OPEN
    ).generate(image)
    assert len(decoded) == labels.max() > 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side: 0; use a whole number, 1 or more"),
        ({"points_per_side": 8.5}, "points_per_side: 8.5; use a whole number, 1 or more"),
        ({"points_per_batch": 0}, "points_per_batch: 0; use a whole number, 1 or more"),
        ({"crop_n_layers": -1}, "crop_n_layers: -1; use a whole number, 0 or more"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor: 0; use a whole"),
        ({"min_mask_region_area": -1}, "min_mask_region_area: -1; use a whole number, 0 or more"),
        ({"pred_iou_thresh": 88}, "pred_iou_thresh: 88; use a number from 0 to 1"),
        ({"pred_iou_thresh": "0.9"}, "pred_iou_thresh: '0.9'; use a number from 0 to 1"),
        ({"stability_score_thresh": -0.1}, "stability_score_thresh: -0.1; use a number from 0 to"),
        ({"stability_score_offset": -1.0}, "stability_score_offset: -1.0; use a number, 0 or more"),
        ({"box_nms_thresh": float("nan")}, "box_nms_thresh: nan; use a number from 0 to 1"),
        ({"crop_nms_thresh": 1.5}, "crop_nms_thresh: 1.5; use a number from 0 to 1"),
        ({"crop_overlap_ratio": 1.5}, "crop_overlap_ratio: 1.5; use a number from 0 to 1"),
        (
            {"points_per_side": None, "point_grids": [[[5, 7]]]},
            r"point_grids\[0\]: from 5 to 7; give x",
        ),
        ({"points_per_side": None, "point_grids": [[0.5, 0.5]]}, r"point_grids\[0\]: shape \(2,\)"),
        ({"point_grids": [np.zeros((1, 2))]}, "give one of them"),
        ({"output_mode": "png"}, "output_mode: 'png'"),
        ({"prompts": "text"}, "prompts: 'text'"),
        ({"box_sides": (0.5, 2.0)}, "box_sides"),
    ],
)
def test_bad_parameters(compiled_predictor, settings, message):
    with pytest.raises(UserError, match=message):
        AutomaticMaskGenerator(compiled_predictor, **settings)


def test_memory_is_that_of_a_batch(compiled_predictor, image, monkeypatch):
    """Nine times the points leave as much on the device, and on the host run lengths only."""
    collect, on_device, on_host = AutomaticMaskGenerator._collect, [], []

    def spy(self, *arguments):
        found = collect(self, *arguments)
        on_device[-1].append(sum(array.nbytes for array in jax.live_arrays()))
        on_host.extend(found)
        return found

    monkeypatch.setattr(AutomaticMaskGenerator, "_collect", spy)
    for points_per_side in (8, 24):
        on_device.append([])
        AutomaticMaskGenerator(
            compiled_predictor, points_per_side, points_per_batch=16, prompts="points", **OPEN
        ).generate(image)
    few, many = on_device
    assert (len(few), len(many)) == (4, 36)
    assert max(many) == max(few)
    assert all(c.counts.base is None for c in on_host)  # a view would keep its whole batch
