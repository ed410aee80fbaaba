"""LiteMedSAM against PyTorch, live: released weights, real slices, whole tensors."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from medsam_jax.models.sam import Sam, SamConfig
from medsam_jax.ops.form import CPU, PLAIN
from tests.golden.lite_medsam_cases import CASES, PROMPT_KINDS, load_golden, prompts_of
from tests.golden.make_lite_medsam import network_input
from tests.parity.torch_models import (
    flax_variables,
    load_torch_lite_medsam,
    torch_decode,
    torch_encode,
)
from tests.tiny import update_state

# Two frameworks sum 10^9 products in different orders; the bound is the project's.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def torch_model():
    return load_torch_lite_medsam()


@pytest.fixture(scope="module", params=[PLAIN, CPU], ids=lambda form: form.device)
def model(torch_model, request):
    model = nnx.eval_shape(lambda: Sam(SamConfig.lite_medsam(), rngs=nnx.Rngs(0)))
    update_state(model, flax_variables(torch_model.state_dict()))
    model.set_attributes(form=request.param)
    return model


@pytest.fixture(scope="module")
def goldens():
    return [load_golden(case) for case in CASES]


@pytest.fixture(scope="module")
def images(goldens):
    return np.concatenate([network_input(golden["image"]) for golden in goldens])


@pytest.fixture(scope="module")
def embeddings(torch_model, images):
    return torch_encode(torch_model, images)


def relative_error(ours, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def decode(model, embeddings, prompts, multimask):
    """Runs our prompt encoder and mask decoder on [B, h, w, C] with prompts [B, P, ...]."""
    points = (prompts["points"], prompts["labels"]) if "points" in prompts else None
    run = jax.jit(functools.partial(model.decode, multimask_output=multimask))
    return run(embeddings, points, prompts.get("boxes"), prompts.get("masks"))


@pytest.mark.parametrize("batch", [1, 3])
def test_image_embedding(model, images, embeddings, batch):
    ours = jax.jit(model.image_encoder)(images[:batch])
    assert relative_error(ours, embeddings[:batch]) <= TOLERANCE


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_one_image(torch_model, model, goldens, embeddings, kind, multimask):
    prompts = prompts_of(goldens[0], kind)
    logits, iou = torch_decode(torch_model, embeddings[0], prompts, multimask)
    batched = {name: value[None] for name, value in prompts.items()}
    our_logits, our_iou = decode(model, embeddings[:1], batched, multimask)
    assert relative_error(our_logits[0], logits) <= TOLERANCE
    assert relative_error(our_iou[0], iou) <= TOLERANCE


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_batch_with_two_prompts_each(torch_model, model, goldens, embeddings, kind):
    """Images times prompts in one call: where repeated embeddings would be mixed up."""
    per_image = []
    for golden in goldens:
        one = prompts_of(golden, kind)
        other = {name: _moved(name, value) for name, value in one.items()}
        per_image.append({name: np.concatenate([one[name], other[name]]) for name in one})
    stacked = {name: np.stack([p[name] for p in per_image]) for name in per_image[0]}
    our_logits, our_iou = decode(model, embeddings, stacked, multimask=True)
    for index, prompts in enumerate(per_image):
        logits, iou = torch_decode(torch_model, embeddings[index], prompts, True)
        assert relative_error(our_logits[index], logits) <= TOLERANCE
        assert relative_error(our_iou[index], iou) <= TOLERANCE


def _moved(name: str, value: np.ndarray) -> np.ndarray:
    """A second prompt unlike the first: 20 pixels up, or the mask upside down."""
    if name == "masks":
        return np.ascontiguousarray(value[:, ::-1])
    return value if name == "labels" else value - np.float32(20)


def test_whole_model(torch_model, model, goldens, images):
    """Image in, mask logits out: the encoder's error goes through the decoder."""
    boxes = np.stack([golden["box"][None] for golden in goldens])

    @jax.jit
    def whole(images, boxes):
        return model.decode(model.image_encoder(images), boxes=boxes)

    logits, _ = whole(images, boxes)
    for index in range(len(goldens)):
        embedding = torch_encode(torch_model, images[index : index + 1])[0]
        expected, _ = torch_decode(torch_model, embedding, {"boxes": boxes[index]}, False)
        assert relative_error(logits[index], expected) <= TOLERANCE
