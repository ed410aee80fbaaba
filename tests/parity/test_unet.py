"""Our U-Net against the same network in PyTorch: outputs, loss and the first training steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import unet_pytorch
from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.models.checkpoint import abstract_model, build_model
from medsam_jax.models.functional import Functional, flatten_state, parameter_names
from medsam_jax.models.unet import UNetConfig
from medsam_jax.training import optimizer as opt
from medsam_jax.training.config import base_config
from medsam_jax.training.step import init_state, make_train_step, predict, with_prompt_axis

STEPS = 3


def config_of(box_channel):
    preprocessing = dataclasses.replace(PREPROCESSING["lite"], image_size=64)
    return UNetConfig("u", (8, 16, 16, 24), box_channel, 3, 64, preprocessing)


@pytest.fixture(params=[True, False], ids=["box", "no_box"])
def pair(request):
    """Our model and PyTorch's with the same random weights."""
    config = config_of(request.param)
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        if name.endswith("kernel")
        else rng.normal(float(name.endswith("scale")), 0.1, leaf.shape)
        for name, leaf in flatten_state(abstract_model(config)).items()
    }
    params = {name: value.astype(np.float32) for name, value in params.items()}
    theirs = unet_pytorch.UNet(config)
    unet_pytorch.load_flax(theirs, params)
    return build_model(config, params, "test"), theirs


def batch(seed):
    rng = np.random.default_rng(seed)
    image, mask = np.zeros((2, 256, 256, 3), np.uint8), np.zeros((2, 256, 256), np.uint8)
    image[:, :, :200] = rng.integers(0, 256, (2, 256, 200, 3))
    mask[0, 50:120, 60:100] = mask[1, 20:90, 70:190] = 1
    box = np.array([[58, 47, 101, 122], [66, 20, 194, 93]], np.float32)
    valid_shape = np.array([[256, 200], [256, 200]], np.int32)
    return {"image": image, "mask": mask, "box": box, "valid_shape": valid_shape}


def test_weights_survive_both_ways(pair):
    ours, theirs = pair
    copied = unet_pytorch.to_flax(theirs)
    arrays = flatten_state(ours)
    assert copied.keys() == arrays.keys()
    for name, value in copied.items():
        np.testing.assert_array_equal(value, arrays[name])


def test_logits(pair):
    ours, theirs = pair
    given = batch(1)
    functional = Functional(ours)

    @jax.jit
    def answer(arrays, given):
        return predict(functional.bind(arrays), with_prompt_axis(given))[0][0][:, 0, 0]

    logits = answer(functional.arrays, given)
    with torch.no_grad():
        expected = unet_pytorch.on_stored_grid(
            theirs(unet_pytorch.inputs(given, ours.config))[-1], 256
        )
    # Float32 sums in another order, through nine instance norms.
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_training_steps(pair):
    """Losses of the first steps: loss, gradients, clipping, decay and Adam are the same."""
    ours, theirs = pair
    config = base_config()
    config.learning_rate, config.frozen = 1e-3, ()
    functional = Functional(ours)
    labels = opt.label_parameters(functional.arrays, parameter_names(ours), ())
    tx = opt.make_optimizer(config, labels)
    state = init_state(functional.arrays, labels, tx, config)
    step = jax.jit(make_train_step(functional, tx, labels, config))
    optimizer = unet_pytorch.make_optimizer(theirs, config)
    for number in range(STEPS):
        given = batch(number)
        state, scalars = step(state, jax.tree.map(jnp.asarray, given))
        loss, norm = unet_pytorch.step_once(theirs, optimizer, given, ours.config, config, 1e-3)
        # Adam's first steps divide small gradients by their own size, so rounding grows.
        tolerance = 1e-5 if number == 0 else 2e-3
        assert float(scalars["loss"]) == pytest.approx(loss, rel=tolerance)
        assert float(scalars["gradient_norm"]) == pytest.approx(norm, rel=10 * tolerance)
