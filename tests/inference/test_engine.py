"""Engine: all local devices give the answers of one; each door applies the intensity rule once."""

import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import SimpleITK as sitk
from flax import nnx

from medsam_jax.data.preprocess import normalise_intensity, resize_image
from medsam_jax.data.recipes import get_recipe
from medsam_jax.errors import UserError
from medsam_jax.hub import load_model
from medsam_jax.inference import mask_records
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator
from medsam_jax.inference.engine import Engine
from medsam_jax.inference.predict_file import FilePredictor, Request
from medsam_jax.inference.predict_folder import predict_path
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.prompts import Prompts
from medsam_jax.inference.volume import VolumePredictor
from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.sam import PREPROCESSING

FOUR = "--xla_force_host_platform_device_count=4"
ON_FOUR = """
import sys
import jax, numpy as np
from medsam_jax.hub import load_model
from medsam_jax.inference.engine import Engine
from tests.inference.test_engine import answers

assert len(jax.local_devices()) == 4
model = load_model(sys.argv[1])
stored = np.zeros((3, 256, 256, 3), np.uint8)
batch = Engine(model).embed(stored, np.full((3, 2), 256, np.int32))
assert [shard.data.shape[0] for shard in batch.addressable_shards] == [1, 1, 1, 1]
embeddings, logits, single = answers(model)
assert len(logits.sharding.device_set) == 4 and len(single.sharding.device_set) == 1
np.savez(sys.argv[2], embeddings=embeddings, logits=logits, single=single)
"""


def answers(model):
    """Embeddings of six images, which fill two batches of four, and logits for some of them."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40 + i, 60 - i), np.uint8) for i in range(6)]
    engine = Engine(model)
    encoded = engine.encode(images)
    embeddings = np.stack([image.embedding for image in encoded])
    shapes = [image.original_shape for image in encoded]
    boxes = rng.uniform(0, 15, (6, 1, 4)).astype(np.float32) + np.float32([0, 0, 20, 20])
    prompts = [Prompts(boxes=box) for box in boxes]
    logits, _ = engine.decode(embeddings[:4], shapes[:4], prompts[:4])
    single, _ = engine.decode(embeddings[5:], shapes[5:], prompts[5:])
    return embeddings, logits, single


def test_four_devices_give_the_answers_of_one(model, tmp_path):
    save_model(tmp_path / "model", flatten_state(model), model.config, {})
    subprocess.run(
        [sys.executable, "-c", ON_FOUR, str(tmp_path / "model"), str(tmp_path / "four.npz")],
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FOUR}"},
        check=True,
    )
    with np.load(tmp_path / "four.npz") as four:
        for found, expected in zip(four.values(), answers(model), strict=True):
            bound = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


@pytest.fixture(scope="module")
def v1_predictor(model):
    """Recipe v1 clips 8-bit images to percentiles too: applied twice, its rule shows."""
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    contract = dataclasses.replace(PREPROCESSING["v1"], image_size=64)
    other.config = dataclasses.replace(model.config, preprocessing=contract)
    return Predictor(other)


@pytest.fixture
def hounsfield(tmp_path):
    """A CT of air, tissue around 35 HU and bone, and its file."""
    rng = np.random.default_rng(0)
    volume = rng.normal(35, 20, (3, 40, 50))
    volume[:, :10] = -1000
    volume[:, 12:15, 20:30] = 900
    volume = volume.astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / "ct.nii.gz"))
    return volume, str(tmp_path / "ct.nii.gz")


@pytest.mark.parametrize(
    "door", ["set_image", "generate", "volume", "command with a box", "command, automatic"]
)
def test_each_door_applies_the_intensity_rule_once(
    v1_predictor, hounsfield, tmp_path, monkeypatch, door
):
    shown = []
    encode = Engine.encode

    def spy(self, images):
        shown.extend(images)
        return encode(self, images)

    monkeypatch.setattr(Engine, "encode", spy)
    one_box = np.array([[5.0, 12.0, 40.0, 35.0]])
    monkeypatch.setattr(mask_records, "box_grid", lambda shape, sides: one_box)
    predictor = Predictor.of(v1_predictor)
    monkeypatch.setattr(FilePredictor, "_predictor", predictor)
    volume, path = hounsfield
    request = {"modality": "CT", "slice_index": 1, "follow": "off"}
    if door == "set_image":
        predictor.set_image(volume[1], "CT")
    elif door == "generate":
        AutomaticMaskGenerator(predictor).generate(volume[1], "CT")
    elif door == "volume":
        of_volume = VolumePredictor(predictor)
        of_volume.set_volume(volume, "CT")
        of_volume.add_prompt(1, box=one_box[0])
        of_volume.predict_slices()
    elif door == "command with a box":
        predict_path(Request("v1", path, tmp_path / "out", boxes=one_box.tolist(), **request))
    else:
        predict_path(Request("v1", path, tmp_path / "out", auto=True, **request))
    expected = normalise_intensity(volume, "CT", get_recipe("v1"))
    assert expected[:, 15:].mean() == pytest.approx(91, abs=1)
    encoded = [1] if len(shown) == 1 else [0, 1, 2]  # a volume's slices, by the block
    np.testing.assert_array_equal(shown, expected[encoded])


def test_images_that_were_not_normalised_are_refused(predictor):
    with pytest.raises(UserError, match="type int16; give the uint8 image of Predictor.normalise"):
        predictor.set_normalised([np.zeros((5, 5), np.int16)])


@pytest.fixture(scope="module")
def unet_predictor(unet):
    predictor = Predictor(unet)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (60, 90), np.uint8))
    return predictor


def test_a_unet_answers_boxes(unet, unet_predictor):
    image = np.random.default_rng(0).integers(0, 256, (60, 90), np.uint8)
    boxes = np.array([[10, 5, 60, 50], [0, 0, 20, 20]], np.float32)
    masks, scores, logits = unet_predictor.predict(box=boxes)
    stored, valid_shape = resize_image(image, get_recipe("lite"))
    pixels = unet.encode(jnp.asarray(stored[None]), jnp.array([valid_shape]))
    expected, _ = unet.decode(pixels, boxes=jnp.asarray(boxes[None] * np.float32(32 / 90)))
    assert logits.shape == (2, 1, 32, 32)
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected[0], atol=bound, rtol=0)
    assert masks.shape == (2, 1, 60, 90)
    np.testing.assert_array_equal(masks, unet_predictor.restore(logits))
    assert np.isnan(scores).all()


@pytest.mark.parametrize(
    ("prompt", "given"),
    [
        ({"point_coords": [[3, 3]], "point_labels": [1]}, "points"),
        (
            {"box": [1, 1, 9, 9], "point_coords": [[3, 3]], "point_labels": [1]},
            "points and box",
        ),
        ({"box": [1, 1, 9, 9], "mask_input": np.zeros((32, 32))}, "box and mask_input"),
    ],
)
def test_a_unet_takes_nothing_but_a_box(unet_predictor, prompt, given):
    with pytest.raises(UserError, match=f"prompt: {given} given; a U-Net takes a box and nothing"):
        unet_predictor.predict(**prompt)
    with pytest.raises(UserError, match="model: a U-Net predicts no IoU"):
        AutomaticMaskGenerator(unet_predictor)


def test_a_unet_follows_a_volume(unet):
    """Its scores are unknown, which must not read as "not reached"."""
    predictor = VolumePredictor(unet, elongation=None, least_overlap=0, most_growth=np.inf)
    predictor.set_volume(np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8))
    predictor.add_prompt(1, box=[5, 5, 30, 30])
    mask, scores = predictor.propagate()
    assert mask.any(axis=(1, 2)).all()
    assert np.isnan(scores).all()


def test_a_unet_of_another_size(unet, tmp_path):
    save_model(tmp_path / "unet", flatten_state(unet), unet.config, {})
    larger = load_model(tmp_path / "unet", image_size=64)
    assert larger.config.image_size == larger.config.preprocessing.image_size == 64
    predictor = Predictor(larger)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (60, 90), np.uint8))
    _, _, logits = predictor.predict(box=[10, 5, 60, 50])
    assert logits.shape == (1, 64, 64)
    with pytest.raises(UserError, match="66 is no multiple of the U-Net's reduction, 4 pixels"):
        load_model(tmp_path / "unet", image_size=66)
