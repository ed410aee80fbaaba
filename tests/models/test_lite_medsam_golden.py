"""LiteMedSAM against stored answers of PyTorch on real slices: whole path, no PyTorch needed."""

import functools

import jax
import numpy as np
import pytest

import medsam_jax
from medsam_jax.models.functional import Functional
from medsam_jax.ops.form import CPU, PLAIN
from tests.golden.lite_medsam_cases import CASES, PROMPT_KINDS, STRIDE, load_golden, prompts_of

# Two frameworks sum 10^9 products in different orders; of each tensor's largest value.
TOLERANCE = 1e-4


@pytest.fixture(scope="session", params=[PLAIN, CPU], ids=lambda form: form.device)
def model(request):
    """The converted weights: fetched by pip and kept in the cache folder at the first use."""
    functional = Functional(medsam_jax.load_model("lite_medsam"), request.param)
    return functional.bind(functional.arrays)


@pytest.fixture(scope="session")
def goldens():
    return [load_golden(case) for case in CASES]


@pytest.fixture(scope="session")
def embeddings(model, goldens):
    """Embeddings of the stored slices, with the library's normalisation and padding."""
    images = np.zeros((len(goldens), 256, 256, 3), np.uint8)
    shapes = np.array([golden["image"].shape for golden in goldens], np.int32)
    for image, golden, (height, width) in zip(images, goldens, shapes, strict=True):
        image[:height, :width] = golden["image"][..., None]

    @jax.jit
    def encode(images, shapes):
        return model.encode(images, shapes)

    return encode(images, shapes)


def test_image_embedding(embeddings, goldens):
    for embedding, golden in zip(embeddings, goldens, strict=True):
        difference = np.abs(np.asarray(embedding)[::STRIDE, ::STRIDE] - golden["embedding"])
        assert difference.max() <= TOLERANCE * golden["embedding_max"]


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_masks_and_scores(model, embeddings, goldens, kind, multimask):
    prompts = [prompts_of(golden, kind) for golden in goldens]
    stacked = {name: np.stack([p[name] for p in prompts]) for name in prompts[0]}
    points = (stacked["points"], stacked["labels"]) if "points" in stacked else None
    decode = jax.jit(functools.partial(model.decode, multimask_output=multimask))
    logits, iou = decode(embeddings, points, stacked.get("boxes"), stacked.get("masks"))
    name = f"{kind}_{'multi' if multimask else 'single'}"
    for our_logits, our_iou, golden in zip(logits[:, 0], iou[:, 0], goldens, strict=True):
        sampled = np.asarray(our_logits)[:, ::STRIDE, ::STRIDE]
        difference = np.abs(sampled - golden[f"{name}_logits"])
        assert difference.max() <= TOLERANCE * golden[f"{name}_logits_max"]
        np.testing.assert_allclose(our_iou, golden[f"{name}_iou"], rtol=TOLERANCE)


def test_kinds_in_one_padded_call(model, embeddings, goldens):
    """A box, a point and points as three prompts of one call answer as each alone does."""
    coords = np.zeros((len(goldens), 3, 4, 2), np.float32)
    labels = np.full((len(goldens), 3, 4), -2, np.int32)
    boxes = np.stack([np.tile(golden["box"], (3, 1)) for golden in goldens])
    boxes_valid = np.tile([True, False, False], (len(goldens), 1))
    for index, golden in enumerate(goldens):
        coords[index, 1, :1], labels[index, 1, :1] = golden["points"][:1], golden["labels"][:1]
        coords[index, 2, :3], labels[index, 2, :3] = golden["points"], golden["labels"]
    decode = jax.jit(functools.partial(model.decode, multimask_output=True))
    logits, _ = decode(embeddings, (coords, labels), boxes, boxes_valid=boxes_valid)
    for of_image, golden in zip(np.asarray(logits), goldens, strict=True):
        for ours, kind in zip(of_image, ("box", "point", "points"), strict=True):
            difference = np.abs(ours[:, ::STRIDE, ::STRIDE] - golden[f"{kind}_multi_logits"])
            assert difference.max() <= TOLERANCE * golden[f"{kind}_multi_logits_max"]
