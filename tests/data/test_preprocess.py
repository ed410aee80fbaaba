"""Every recipe against an independent statement of its protocol in NumPy and SciPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from medsam_jax.data import modality, preprocess
from medsam_jax.data.recipes import PREPROCESSING, RECIPES, Preprocessing
from medsam_jax.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smooth(rng, shape):
    """A texture with edges: what resampling differs on."""
    image = ndimage.gaussian_filter(rng.uniform(0, 255, shape), 0.8)
    image[: shape[0] // 3, shape[1] // 2 :] = 250
    return ((image - image.min()) / np.ptp(image) * 255).astype(np.uint8)


# --- intensity


@pytest.mark.parametrize(
    ("recipe", "window", "lower", "upper"),
    [
        ("v1", None, -500, 1000),
        ("lite", None, -500, 1000),
        ("v2", None, -160, 240),
        ("v2", "lung", -1350, 150),
        ("v2", "brain", 0, 80),
    ],
)
def test_ct_window_maps_to_0_255(rng, recipe, window, lower, upper):
    volume = rng.integers(-1100, 2000, (3, 8, 9)).astype(np.int16)
    volume[0, 0, :3] = lower, upper, 0
    clipped = np.clip(volume.astype(np.float64), lower, upper)
    expected = np.floor((clipped - lower) * 255 / (upper - lower) + 1e-6)
    found = preprocess.normalise_intensity(volume, "ct", RECIPES[recipe], window)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    assert found[0, 0, 0] == 0
    assert found[0, 0, 1] == 255


def test_water_is_not_black():
    volume = np.array([[[-500, 0, 1000]]], np.int16)
    found = preprocess.normalise_intensity(volume, "CT", RECIPES["v1"])
    assert found.tolist() == [[[0, 85, 255]]]


def test_v1_percentiles_are_of_the_whole_volume(rng):
    volume = rng.gamma(2.0, 100.0, (6, 20, 20)).astype(np.float32)
    volume[:2] = 0
    ordered = np.sort(volume.ravel().astype(np.float64))
    rank = np.array([0.0095, 0.995]) * (ordered.size - 1)
    lower, upper = np.interp(rank, np.arange(ordered.size), ordered)
    expected = (np.clip(volume, lower, upper) - lower) / (upper - lower) * 255
    found = preprocess.normalise_intensity(volume, "MR", RECIPES["v1"])
    assert np.abs(found - np.floor(expected)).max() <= 1
    assert np.count_nonzero(found != np.floor(expected)) < 5  # float32 against float64 at a step


@pytest.mark.parametrize("recipe", ["v2", "lite"])
def test_positive_percentiles_leave_zeros_at_zero(rng, recipe):
    volume = rng.gamma(2.0, 100.0, (6, 20, 20))
    volume[:3] = 0
    inside = np.sort(volume[volume > 0])
    rank = np.array([0.005, 0.995]) * (inside.size - 1)
    lower, upper = np.interp(rank, np.arange(inside.size), inside)
    expected = np.floor((np.clip(volume, lower, upper) - lower) / (upper - lower) * 255)
    expected[volume == 0] = 0
    found = preprocess.normalise_intensity(volume, "MR", RECIPES[recipe])
    assert np.abs(found - expected).max() <= 1
    assert (found[:3] == 0).all()


def test_limits_of_the_scan_apply_to_a_slice(rng):
    volume = rng.uniform(0, 1000, (5, 12, 12))
    recipe = RECIPES["v2"]
    limits = preprocess.intensity_limits(volume, "MR", recipe)
    whole = preprocess.normalise_intensity(volume, "MR", recipe)
    part = preprocess.normalise_intensity(volume[2], "MR", recipe, limits=limits)
    np.testing.assert_array_equal(part, whole[2])


def test_a_modality_is_one_function_and_one_row(monkeypatch):
    """PET in standardised uptake values: 0 to 10 become 0 to 255, whatever the scan holds."""

    def uptake(volume, settings, window):
        return 0.0, 10.0

    rule = modality.IntensityRule(uptake, physical=True)
    volume = np.array([[[0.0, 2.0, 10.0, 40.0]]], np.float32)
    before = preprocess.normalise_intensity(volume, "PT", RECIPES["lite"])
    monkeypatch.setitem(modality.RULES, "PT", rule)
    found = preprocess.normalise_intensity(volume, "pt", RECIPES["lite"])
    assert found.tolist() == [[[0, 51, 255, 255]]]
    assert before.tolist() != found.tolist()
    stored = found[..., :2]
    assert preprocess.normalise_intensity(stored, "PT", RECIPES["v1"]) is stored  # 8 bits stay


def test_8_bit_pictures(rng):
    picture = rng.integers(20, 200, (9, 7, 3)).astype(np.uint8)
    for recipe in ("v2", "lite", "sam"):
        found = preprocess.normalise_intensity(picture, "dermoscopy", RECIPES[recipe])
        np.testing.assert_array_equal(found, picture)
    stretched = preprocess.normalise_intensity(picture, "dermoscopy", RECIPES["v1"])
    assert stretched.min() == 0
    assert stretched.max() == 255
    ct = preprocess.normalise_intensity(picture, "CT", RECIPES["v1"])
    np.testing.assert_array_equal(ct, picture)  # 8 bits hold no HU


@pytest.mark.parametrize(
    ("volume", "modality", "window", "message"),
    [
        (np.full((2, 3, 3), 7.0), "MR", None, "constant"),
        (np.full((2, 3, 3), -7.0), "MR", None, "above 0"),
        (np.zeros((2, 3, 3), np.int16), "CT", "bone", "window: 'bone'"),
    ],
)
def test_unusable_intensities_are_refused(volume, modality, window, message):
    with pytest.raises(UserError, match=message):
        preprocess.normalise_intensity(volume, modality, RECIPES["v2"], window)


# --- geometry


def skimage_resize(image, shape):
    """`skimage.transform.resize(order=3, anti_aliasing=True, mode="constant")` spelt in SciPy."""
    factors = np.divide(image.shape, shape)
    sigma = np.maximum(0, (factors - 1) / 2)
    blurred = ndimage.gaussian_filter(image.astype(np.float64), sigma, mode="constant")
    resized = ndimage.zoom(blurred, 1 / factors, order=3, mode="grid-constant", grid_mode=True)
    return np.clip(resized, image.min(), image.max())


@pytest.mark.parametrize("shape", [(120, 97), (300, 411), (64, 700), (256, 256)])
def test_spline_resize_is_that_of_scipy(rng, shape):
    image = smooth(rng, shape)
    found, valid_shape = preprocess.resize_image(image, RECIPES["v1"])
    assert valid_shape == (256, 256)
    assert found.shape == (256, 256, 3)
    expected = skimage_resize(image, (256, 256))
    assert np.abs(found[:, :, 0] - np.floor(expected)).max() <= 1
    # the two differ only where the exact value is a whole grey level, to float32 rounding
    differs = found[:, :, 0] != np.floor(expected)
    np.testing.assert_allclose(expected[differs], np.round(expected[differs]), atol=2e-3)
    np.testing.assert_array_equal(found[:, :, 0], found[:, :, 2])


def test_spline_resize_of_colours_is_by_channel(rng):
    picture = np.stack([smooth(rng, (90, 130)) for _ in range(3)], axis=-1)
    found, _ = preprocess.resize_image(picture, RECIPES["v1"])
    low, high = int(picture.min()), int(picture.max())
    for channel in range(3):
        alone, _ = preprocess.resize_image(picture[:, :, channel], RECIPES["v1"])
        np.testing.assert_array_equal(found[:, :, channel], np.clip(alone[:, :, 0], low, high))


def test_v2_stores_1024(rng):
    image = smooth(rng, (40, 50))
    found, valid_shape = preprocess.resize_image(image, RECIPES["v2"])
    assert valid_shape == (1024, 1024)
    expected = np.floor(skimage_resize(image, (1024, 1024)))
    assert np.abs(found[:, :, 0] - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(512, 384), (300, 1024)])
def test_lite_area_resize_pads_bottom_and_right(rng, height, width):
    image = smooth(rng, (height, width))
    found, (valid_height, valid_width) = preprocess.resize_image(image, RECIPES["lite"])
    factor = max(height, width) // 256
    assert (valid_height, valid_width) == (height // factor, width // factor)
    blocks = image[: valid_height * factor, : valid_width * factor]
    blocks = blocks.reshape(valid_height, factor, valid_width, factor).mean(axis=(1, 3))
    assert np.abs(found[:valid_height, :valid_width, 0] - blocks).max() <= 0.5 + 1e-9
    assert not found[valid_height:].any()
    assert not found[:, valid_width:].any()


@pytest.mark.parametrize("name", ["v1", "lite", "sam"])
@pytest.mark.parametrize("shape", [(100, 140), (512, 512), (301, 77)])
def test_mask_takes_the_nearest_pixel_centre(rng, name, shape):
    recipe = RECIPES[name]
    labels = rng.integers(0, 6, shape).astype(np.uint8)
    found = preprocess.resize_mask(labels, recipe)
    height, width = preprocess.resized_shape(shape, recipe)
    factors = np.divide((height, width), shape)
    zoomed = ndimage.zoom(labels, factors, order=0, mode="nearest", grid_mode=True)
    np.testing.assert_array_equal(found[:height, :width], zoomed)
    assert found.shape == (recipe.size, recipe.size)
    assert not found[height:].any()
    assert not found[:, width:].any()


def test_sam_resize_is_pillows(rng):
    from PIL import Image

    picture = rng.integers(0, 255, (60, 45, 3)).astype(np.uint8)
    found, valid_shape = preprocess.resize_image(picture, RECIPES["sam"])
    assert valid_shape == (1024, 768)
    expected = Image.fromarray(picture).resize((768, 1024), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found[:, :768], np.asarray(expected))


# --- encoder input, prompts, masks


def bilinear(maps, height, width):
    """align_corners=False over the last two axes, one axis at a time by np.interp."""
    for axis, size in ((-2, height), (-1, width)):
        length = maps.shape[axis]
        at = (np.arange(size) + 0.5) * length / size - 0.5
        maps = np.apply_along_axis(
            lambda line, at=at, length=length: np.interp(at, np.arange(length), line), axis, maps
        )
    return maps


def test_lite_input_is_min_max_over_the_valid_part(rng):
    images = np.zeros((2, 256, 256, 3), np.uint8)
    valid = np.array([[200, 256], [256, 31]])
    images[0, :200] = rng.integers(30, 90, (200, 256, 3))
    images[1, :, :31] = rng.integers(0, 255, (256, 31, 3))
    found = np.asarray(preprocess.encoder_input(images, valid, PREPROCESSING["lite"]))
    for image, (height, width), result in zip(images, valid, found, strict=True):
        part = image[:height, :width].astype(np.float64)
        expected = np.zeros((256, 256, 3))
        expected[:height, :width] = (part - part.min()) / np.ptp(part)
        np.testing.assert_allclose(result, expected, atol=1e-6)


def test_sam_input_pads_after_normalising(rng):
    images = np.zeros((1, 1024, 1024, 3), np.uint8)
    images[0, :, :700] = rng.integers(0, 255, (1024, 700, 3))
    found = preprocess.encoder_input(images, np.array([[1024, 700]]), PREPROCESSING["sam"])
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    expected = (images[0, :, :700].astype(np.float64) - mean) / std
    np.testing.assert_allclose(found[0, :, :700], expected, atol=1e-5)
    assert not np.asarray(found[0, :, 700:]).any()


def test_v1_input_is_the_enlarged_slice(rng):
    images = smooth(rng, (256, 256))[None, :, :, None].repeat(3, axis=-1)
    found = preprocess.encoder_input(images, np.array([[256, 256]]), PREPROCESSING["v1"])
    enlarged = bilinear(images[0, :, :, 0].astype(np.float64), 1024, 1024)
    assert found.shape == (1, 1024, 1024, 3)
    grey = np.asarray(found[0, :, :, 0]) * 58.395 + 123.675
    assert np.abs(grey - enlarged).max() <= 0.5 + 1e-3  # rounded to grey levels
    np.testing.assert_allclose(grey, np.round(grey), atol=1e-3)


def test_constant_slice_does_not_divide_by_zero():
    images = np.full((1, 256, 256, 3), 9, np.uint8)
    found = preprocess.encoder_input(images, np.array([[256, 256]]), PREPROCESSING["lite"])
    assert not np.asarray(found).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lite", (50 * 256 / 300, 40 * 256 / 300)),
        ("sam", (50 * 683 / 200, 40 * 1024 / 300)),
        ("v2", (50 * 1024 / 200, 40 * 1024 / 300)),
        ("v1", (50 * 1024 / 200, 40 * 1024 / 300)),
    ],
)
def test_prompts_scale_as_the_image(name, expected):
    found = preprocess.prompts_to_input(np.array([[50.0, 40.0]]), (300, 200), PREPROCESSING[name])
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_stored_prompts_scale_with_the_enlargement():
    assert preprocess.stored_to_input(np.array([1.0, 10.0]), PREPROCESSING["v1"]).tolist() == [
        4,
        40,
    ]
    assert preprocess.stored_to_input(np.array([1.0]), PREPROCESSING["lite"]).tolist() == [1.0]


def test_lite_masks_are_cropped_then_enlarged(rng):
    logits = rng.normal(size=(2, 256, 256)).astype(np.float32)
    found = preprocess.restore_masks(
        jnp.asarray(logits), (200, 256), (400, 512), PREPROCESSING["lite"], return_logits=True
    )
    expected = bilinear(logits[:, :200].astype(np.float64), 400, 512)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    masks = preprocess.restore_masks(logits, (200, 256), (400, 512), PREPROCESSING["lite"])
    assert masks.dtype == bool
    sure = np.abs(expected) > 1e-5
    np.testing.assert_array_equal(np.asarray(masks)[sure], (expected > 0)[sure])


def test_sam_masks_go_by_way_of_the_input_grid(rng):
    logits = rng.normal(size=(256, 256)).astype(np.float32)
    found = preprocess.restore_masks(
        logits, (1024, 512), (300, 150), PREPROCESSING["sam"], return_logits=True
    )
    expected = bilinear(bilinear(logits.astype(np.float64), 1024, 1024)[:, :512], 300, 150)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_v2_interpolates_probabilities(rng):
    logits = (3 * rng.normal(size=(256, 256))).astype(np.float32)
    masks = preprocess.restore_masks(logits, (1024, 1024), (310, 290), PREPROCESSING["v2"])
    probability = bilinear(1 / (1 + np.exp(-logits.astype(np.float64))), 310, 290)
    sure = np.abs(probability - 0.5) > 1e-6
    np.testing.assert_array_equal(np.asarray(masks)[sure], (probability > 0.5)[sure])


def test_stored_grid_logits(rng):
    logits = rng.normal(size=(2, 3, 256, 256)).astype(np.float32)
    same = preprocess.stored_grid_logits(logits, PREPROCESSING["lite"])
    np.testing.assert_array_equal(same, logits)
    enlarged = preprocess.stored_grid_logits(logits[:1, :1], PREPROCESSING["v2"])
    np.testing.assert_allclose(enlarged, bilinear(logits[:1, :1], 1024, 1024), atol=1e-5)


# --- contracts


@pytest.mark.parametrize("name", list(PREPROCESSING))
def test_preprocessing_round_trip(name):
    import json

    contract = PREPROCESSING[name]
    assert Preprocessing.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown fields.*colour"),
        ({"recipe": "v9"}, "recipe: 'v9' is unknown"),
        ({"ct_windows": ["wide", "lung"]}, "ct_windows wide, lung are not all of recipe v1's"),
    ],
)
def test_preprocessing_of_another_version_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Preprocessing.from_dict(PREPROCESSING["v1"].to_dict() | change)


def test_missing_fields_are_named():
    with pytest.raises(UserError, match=r"missing fields \['image_size', 'normalisation'\]"):
        Preprocessing.from_dict({"recipe": "v1"})


def test_another_recipe_is_refused_by_both_names():
    @dataclasses.dataclass
    class Info:
        recipe: str

    preprocess.check_compatible(Info("lite"), PREPROCESSING["lite"])
    with pytest.raises(UserError, match="'v1'.*'lite'.*--recipe lite"):
        preprocess.check_compatible(Info("v1"), PREPROCESSING["lite"])
