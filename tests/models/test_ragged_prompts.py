"""A padded batch of images with different prompts gives exactly what each prompt gives alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.data.prompts import PADDING_LABEL
from medsam_jax.models.functional import Functional
from medsam_jax.ops.form import CPU, PLAIN
from tests.tiny import tiny_sam

SIDE = 64  # of the tiny model's input, and of its low-resolution masks


@pytest.fixture(scope="module", params=[PLAIN, CPU], ids=lambda form: form.device)
def decode(request):
    """(embeddings, prompts, multimask_output) -> logits, IoU; compiled once per kind of prompt."""
    functional = Functional(tiny_sam(), request.param)

    @jax.jit
    def both(arrays, embeddings, prompts):
        model = functional.bind(arrays)
        return [model.decode(embeddings, **prompts, multimask_output=m) for m in (True, False)]

    return lambda embeddings, prompts: both(functional.arrays, embeddings, prompts)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 16, 16, 32)).astype(np.float32)


# (points with labels, box, mask): what one prompt may hold; two images with three prompts each.
rng = np.random.default_rng(1)
POINTS = rng.uniform(0, SIDE, (6, 4, 2)).astype(np.float32)
LABELS = rng.integers(0, 2, (6, 4)).astype(np.int32)
BOXES = np.sort(rng.uniform(0, SIDE, (6, 2, 2)), axis=1).reshape(6, 4).astype(np.float32)
MASKS = rng.normal(size=(6, SIDE, SIDE)).astype(np.float32)
KINDS = [
    {"points": 1},
    {"points": 4, "box": True},
    {"box": True},
    {"points": 2, "mask": True},
    {"box": True, "mask": True},
    {"points": 3, "box": True, "mask": True},
]


def alone(index: int) -> dict:
    """Prompt `index` as SAM would be given it: only what it has, no padding."""
    kind, prompts = KINDS[index], {}
    if count := kind.get("points"):
        coords, labels = POINTS[index, :count], LABELS[index, :count]
        prompts["points"] = (jnp.array(coords[None, None]), jnp.array(labels[None, None]))
    if kind.get("box"):
        prompts["boxes"] = jnp.array(BOXES[None, None, index])
    if kind.get("mask"):
        prompts["masks"] = jnp.array(MASKS[None, None, index])
    return prompts


def together() -> dict:
    """All six as a batch of two images with three prompts, filled up with garbage."""
    counts = np.array([kind.get("points", 0) for kind in KINDS])
    labels = np.where(np.arange(4) < counts[:, None], LABELS, PADDING_LABEL)
    return {
        "points": (jnp.array(POINTS.reshape(2, 3, 4, 2)), jnp.array(labels.reshape(2, 3, 4))),
        "boxes": jnp.array(BOXES.reshape(2, 3, 4)),
        "masks": jnp.array(MASKS.reshape(2, 3, SIDE, SIDE)),
        "boxes_valid": jnp.array([kind.get("box", False) for kind in KINDS]).reshape(2, 3),
        "masks_valid": jnp.array([kind.get("mask", False) for kind in KINDS]).reshape(2, 3),
    }


def test_batch_equals_single(decode, embeddings):
    batched = decode(embeddings, together())
    for index in range(6):
        image, prompt = divmod(index, 3)
        single = decode(embeddings[image : image + 1], alone(index))
        for (logits, iou), (expected_logits, expected_iou) in zip(batched, single, strict=True):
            scale = float(jnp.abs(expected_logits).max())
            np.testing.assert_allclose(
                logits[image, prompt], expected_logits[0, 0], rtol=0, atol=1e-5 * scale
            )
            np.testing.assert_allclose(iou[image, prompt], expected_iou[0, 0], rtol=0, atol=1e-5)


def test_padding_is_not_read(decode, embeddings):
    """Checks that values in the padding do not change a bit of the output."""
    prompts = together()
    coords, labels = prompts["points"]
    other = dict(prompts)
    other["points"] = (jnp.where((labels == PADDING_LABEL)[..., None], 7.0, coords), labels)
    other["boxes"] = jnp.where(prompts["boxes_valid"][..., None], prompts["boxes"], 3.0)
    other["masks"] = jnp.where(prompts["masks_valid"][..., None, None], prompts["masks"], 5.0)
    for before, after in zip(decode(embeddings, prompts), decode(embeddings, other), strict=True):
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_array_equal(before[1], after[1])


def test_no_prompt_at_all_is_one_mask_of_each_image(decode, embeddings):
    (logits, iou), _ = decode(embeddings[:1], {})
    assert logits.shape == (1, 1, 3, SIDE, SIDE)
    assert iou.shape == (1, 1, 3)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"masks are \(32, 32\), .* takes \(64, 64\)"):
        tiny_sam().prompt_encoder(masks=jnp.zeros((1, 1, 32, 32)))
