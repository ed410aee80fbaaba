"""Predictor: coordinates and shapes, batches against single calls, compilations, bad input."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from medsam_jax.data.preprocess import encoder_input, resize_image, restore_masks
from medsam_jax.data.recipes import get_recipe
from medsam_jax.errors import UserError
from medsam_jax.inference import engine
from medsam_jax.inference.engine import Engine
from medsam_jax.inference.predictor import Predictor

MASK_SIDE = 64


def picture(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_equals_the_steps_by_hand(model, predictor):
    """Resize, encode, prompt at scaled coordinates, decode, restore; the image is wide."""
    image = picture(90, 150)
    predictor.set_image(image)
    masks, scores, low_res_logits = predictor.predict(
        np.array([[40, 30], [100, 80]]), np.array([1, 0]), box=np.array([20, 10, 120, 80])
    )
    preprocessing = model.config.preprocessing
    stored, valid_shape = resize_image(image, get_recipe("lite"))
    inputs = encoder_input(stored[None], np.array([valid_shape]), preprocessing)
    scale = np.float32(64 / 150)  # the longest side becomes the encoder's 64 pixels
    coords = np.array([[[[40, 30], [100, 80]]]], np.float32) * scale
    boxes = np.array([[[20, 10, 120, 80]]], np.float32) * scale

    @jax.jit
    def call(inputs, points, boxes):
        return model.decode(model.image_encoder(inputs), points, boxes, multimask_output=True)

    logits, iou = call(inputs, (coords, np.array([[[1, 0]]])), boxes)
    np.testing.assert_allclose(low_res_logits, logits[0, 0], atol=1e-5)
    np.testing.assert_allclose(scores, iou[0, 0], atol=1e-5)
    expected = restore_masks(np.asarray(logits[0, 0]), valid_shape, (90, 150), preprocessing)
    assert masks.shape == (3, 90, 150)
    assert masks.dtype == bool
    assert (masks != expected).mean() < 1e-3  # rounding at the threshold
    as_logits, _, _ = predictor.predict(box=np.array([20, 10, 120, 80]), return_logits=True)
    assert as_logits.dtype == np.float32


def test_leading_axis_of_several_prompts(predictor):
    predictor.set_image(picture(60, 60))
    boxes = np.array([[5, 5, 30, 30], [10, 20, 50, 55], [0, 0, 59, 59]])
    masks, scores, low_res_logits = predictor.predict(box=boxes, multimask_output=False)
    assert masks.shape == (3, 1, 60, 60)
    assert scores.shape == (3, 1)
    for index, box in enumerate(boxes):
        _, score, logits = predictor.predict(box=box, multimask_output=False)
        np.testing.assert_allclose(low_res_logits[index], logits, atol=1e-5)
        np.testing.assert_allclose(scores[index], score, atol=1e-5)


def test_ragged_batch_equals_single_calls(predictor):
    """Images of three sizes; a box, five points, and two prompts of a point and a mask."""
    images = [picture(64, 64), picture(100, 40, 1, 1), picture(30, 90, 3, 2)]
    rng = np.random.default_rng(3)
    prompts = [
        {"box": [3, 4, 50, 60]},
        {"point_coords": rng.uniform(0, 40, (5, 2)), "point_labels": [1, 0, 1, 1, 0]},
        {
            "point_coords": rng.uniform(0, 30, (2, 1, 2)),
            "point_labels": [[1], [0]],
            "mask_input": rng.standard_normal((2, 1, MASK_SIDE, MASK_SIDE)),
        },
    ]
    predictor.set_images(images)
    together = predictor.predict_batch(prompts)
    assert [masks.shape for masks, _, _ in together] == [(3, 64, 64), (3, 100, 40), (2, 3, 30, 90)]
    for image, prompt, (_, scores, logits) in zip(images, prompts, together, strict=True):
        predictor.set_image(image)
        _, alone_scores, alone_logits = predictor.predict(**prompt)
        np.testing.assert_allclose(logits, alone_logits, atol=1e-5)
        np.testing.assert_allclose(scores, alone_scores, atol=1e-5)


def test_many_prompts_go_in_parts(predictor):
    predictor.set_image(picture(64, 64))
    coords = np.random.default_rng(0).uniform(0, 63, (130, 1, 2))
    _, scores, _ = predictor.predict(coords, np.ones((130, 1), int))
    assert scores.shape == (130, 3)
    _, last, _ = predictor.predict(coords[-1], [1])
    np.testing.assert_allclose(scores[-1], last, atol=1e-5)


def test_refinement_by_an_earlier_answer(predictor):
    predictor.set_image(picture(64, 64))
    point = {"point_coords": [[20, 20]], "point_labels": [1]}
    _, scores, logits = predictor.predict(**point)
    best = logits[scores.argmax()]
    _, _, refined = predictor.predict(**point, mask_input=best[None], multimask_output=False)
    assert refined.shape == (1, MASK_SIDE, MASK_SIDE)
    _, _, plain = predictor.predict(**point, multimask_output=False)
    assert np.abs(refined - plain).max() > 1e-3


def test_intensities_by_the_recipe(predictor):
    """HU, 16-bit and float images encode as the uint8 image that the recipe makes of them."""
    grey = picture(64, 64, 1)
    predictor.set_image(grey)
    expected = predictor.get_image_embedding()
    hounsfield = grey.astype(np.int16) * (1500 / 255) - 500 + 1e-3
    predictor.set_image(hounsfield.astype(np.float32), modality="CT")
    np.testing.assert_allclose(predictor.get_image_embedding(), expected, atol=0.1)
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    predictor.set_image(ramp)
    of_uint16 = predictor.get_image_embedding()
    predictor.set_image(ramp.astype(np.float64) * 7)
    np.testing.assert_allclose(predictor.get_image_embedding(), of_uint16, atol=1e-5)


def test_ct_in_the_window_of_the_checkpoint(model):
    """Without a named window the recipe's first applies, which is "wide"."""
    hounsfield = np.linspace(-300, 500, 64 * 64).reshape(64, 64)
    plain = Predictor(model)
    contract = dataclasses.replace(model.config.preprocessing, ct_windows=("soft_tissue", "lung"))
    config = dataclasses.replace(model.config, preprocessing=contract)
    with mock.patch.object(model, "config", config):
        trained = Predictor(model)
    for predictor, window, lower, upper in (
        (plain, None, -500, 1000),
        (trained, None, -160, 240),
        (trained, "wide", -500, 1000),
    ):
        grey = (hounsfield.clip(lower, upper) - lower) / (upper - lower) * 255
        found = predictor.normalise(hounsfield, "CT", window)
        np.testing.assert_array_equal(found, (grey + 1e-6).astype(np.uint8))
    ramp = trained.normalise(hounsfield + 301, "MR")
    np.testing.assert_array_equal(ramp, plain.normalise(hounsfield + 301, "MR"))


def test_ct_that_is_not_in_hounsfield_units_is_said(predictor, caplog):
    image = picture(33, 47, 1).astype(np.int16)
    predictor.set_image(image * 4 - 900, "CT")
    assert not caplog.records
    predictor.set_image(image * 4, "CT")
    (record,) = caplog.records
    assert record.getMessage().startswith("image: a CT without a negative value (0 to")


def test_few_compilations_for_many_sizes(model, monkeypatch):
    traces = {"embed_arrays": 0, "decode_arrays": 0}

    def count(name):
        function = getattr(engine, name)

        def counted(*args):
            traces[name] += 1
            return function(*args)

        monkeypatch.setattr(engine, name, counted)

    for name in traces:
        count(name)
    predictor = Predictor(Engine(model))
    for index in range(12):
        predictor.set_image(picture(20 + 7 * index, 80 - 3 * index))
        predictor.predict(box=[1, 1, 15, 15])
        predictor.predict([[1, 1]], [1])
    assert traces == {"embed_arrays": 1, "decode_arrays": 2}  # a box, a point
    predictor.predict([[1, 1], [9, 2], [3, 4]], [1, 0, 1])
    predictor.predict([[1, 1], [9, 2], [3, 4], [5, 5]], [1, 0, 1, 0])
    assert traces == {
        "embed_arrays": 1,
        "decode_arrays": 3,
    }  # three and four points share a program
    with mock.patch("jax.image.resize", side_effect=AssertionError("compiles for each size")):
        predictor.predict(box=[1, 1, 15, 15])


def test_embeddings_saved_and_loaded(model, predictor, tmp_path):
    predictor.set_images([picture(64, 64), picture(40, 90)])
    prompts = [{"box": [1, 2, 30, 30]}, {"box": [5, 5, 80, 30]}]
    expected = predictor.predict_batch(prompts)
    predictor.save_embedding(tmp_path / "two.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["two.npz"]
    other = Predictor(model)
    other.load_embedding(tmp_path / "two.npz")
    for ours, theirs in zip(other.predict_batch(prompts), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    elsewhere = dataclasses.replace(
        model.config.preprocessing, ct_windows=("lung",), mask_threshold=-0.5
    )
    config = dataclasses.replace(model.config, preprocessing=elsewhere, automatic_prompts="points")
    with mock.patch.object(model, "config", config):
        Predictor(model).load_embedding(tmp_path / "two.npz")  # the decoder was trained further

    graph, state = nnx.split(model)
    stranger = Predictor(nnx.merge(graph, jax.tree.map(lambda leaf: 1.5 * leaf, state)))
    with pytest.raises(UserError, match="made with other weights"):
        stranger.load_embedding(tmp_path / "two.npz")
    whole = (tmp_path / "two.npz").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name, content in (
        ("text.npz", b"no archive"),
        ("cut.npz", whole[:middle]),
        ("flipped.npz", flipped),
        ("array.npy", (tmp_path / "array.npy").read_bytes()),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: no file of"):
            stranger.load_embedding(tmp_path / name)


def test_embeddings_go_to_a_new_folder_or_nowhere(predictor, tmp_path):
    predictor.set_image(picture(40, 50))
    predictor.save_embedding(tmp_path / "new" / "one.npz")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.npz"]
    with pytest.raises(UserError, match="one.npz: cannot be written"):
        predictor.save_embedding(tmp_path / "new" / "one.npz" / "two.npz")
    with pytest.raises(UserError, match="cannot be written"):
        predictor.save_embedding(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5), np.uint8), "has no pixels"),
        (np.zeros((4, 5, 5, 3), np.uint8), r"shape \(4, 5, 5, 3\)"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \(5, 5, 2\)"),
        (np.full((5, 5), np.nan), "NaN"),
        (np.zeros((5, 5), bool), "type bool"),
        (np.ones((5, 5), complex), "type complex128"),
        (np.full((5, 5), 3.0), "constant"),
    ],
)
def test_bad_images(predictor, image, message):
    with pytest.raises(UserError, match=message):
        predictor.set_image(image)
    with pytest.raises(UserError, match="no image is set"):
        predictor.predict(box=[0, 0, 1, 1])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "nothing given"),
        ({"point_coords": [[3, 3]]}, "point_labels: missing"),
        ({"point_labels": [1]}, "point_coords: missing"),
        ({"point_coords": [[3, 3]], "point_labels": [2]}, "point_labels: 2"),
        ({"point_coords": [[3, 3]], "point_labels": [1, 0]}, "point_coords: shape"),
        ({"point_coords": [[3, 70]], "point_labels": [1]}, r"\(3, 70\) is outside"),
        ({"point_coords": [[np.nan, 3]], "point_labels": [1]}, "NaN"),
        ({"point_coords": np.zeros((0, 2)), "point_labels": []}, "empty"),
        ({"box": [30, 30, 10, 40]}, "is inverted"),
        ({"box": [70, 10, 90, 40]}, "is outside the image of 60 x 50"),
        (
            {"point_coords": [[3, 3]], "point_labels": [[1], [1, 0]]},
            "point_labels: is not an array of numbers",
        ),
        ({"mask_input": np.zeros((0, MASK_SIDE, MASK_SIDE))}, "mask_input: shape"),
        ({"box": [1, 2, 3]}, r"box: shape \(3,\)"),
        ({"box": "left"}, "box: is not an array of numbers"),
        ({"mask_input": np.zeros((1, 32, 32))}, "mask_input: shape"),
        ({"mask_input": np.zeros((1, 3, MASK_SIDE, MASK_SIDE))}, "choose one"),
        (
            {"box": [[0, 0, 9, 9]] * 2, "point_coords": [[3, 3]], "point_labels": [1]},
            "numbers of prompts differ",
        ),
    ],
)
def test_bad_prompts(predictor, prompt, message):
    predictor.set_image(picture(50, 60))
    with pytest.raises(UserError, match=message):
        predictor.predict(**prompt)


def test_bad_calls(predictor):
    with pytest.raises(UserError, match="none given"):
        predictor.set_images([])
    predictor.set_images([picture(20, 20), picture(20, 30)])
    with pytest.raises(UserError, match="2 images are set; use predict_batch"):
        predictor.predict(box=[0, 0, 5, 5])
    with pytest.raises(UserError, match="1 prompts for 2 images"):
        predictor.predict_batch([{"box": [0, 0, 5, 5]}])
    known = "point_coords, point_labels, box, mask_input"
    with pytest.raises(UserError, match=rf"prompts\[1\]: unknown key 'boxes'; use {known}"):
        predictor.predict_batch([{"box": [0, 0, 5, 5]}, {"boxes": [0, 0, 5, 5]}])
    predictor.reset_image()
    with pytest.raises(UserError, match="no image is set"):
        predictor.get_image_embedding()


def test_probabilities_are_upsampled_where_the_contract_says(model):
    """MedSAM v2 thresholds interpolated probabilities: another mask than from logits."""
    config = model.config
    contract = dataclasses.replace(config.preprocessing, upsample="probabilities")
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    other.config = dataclasses.replace(config, preprocessing=contract)
    image = picture(128, 128)
    answers = []
    for each in (model, other):
        predictor = Predictor(each)
        predictor.set_image(image)
        answers.append(predictor.predict(box=[9, 9, 100, 100], return_logits=True))
    np.testing.assert_array_equal(answers[0][2], answers[1][2])
    assert np.abs(answers[0][0] - answers[1][0]).max() > 1e-3
