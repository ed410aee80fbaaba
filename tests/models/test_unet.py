"""U-Net: the box channel, many boxes, deep supervision, storage, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medsam_jax.errors import UserError
from medsam_jax.hub import load_model
from medsam_jax.metrics import dice
from medsam_jax.models.checkpoint import abstract_model, build_model, save_model
from medsam_jax.models.functional import Functional, flatten_state
from medsam_jax.models.unet import InstanceNorm, UNetConfig, box_mask


def build(config, seed=0):
    """He's weights without a compilation for each shape."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, leaf in flatten_state(abstract_model(config)).items():
        if name.endswith("kernel"):
            deviation = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            params[name] = rng.normal(0, deviation, leaf.shape).astype(np.float32)
        else:
            params[name] = np.full(leaf.shape, name.endswith("scale"), np.float32)
    return build_model(config, params, "test")


@pytest.fixture(scope="module")
def model():
    return build(UNetConfig.tiny())


def run(model, images, **prompts):
    functional = Functional(model)
    call = jax.jit(lambda arrays, *a, **kw: functional.bind(arrays).decode(*a, **kw)[0])
    return call(functional.arrays, images, **prompts)


def test_box_mask_holds_its_far_sides():
    mask = box_mask(jnp.array([[2.0, 1.0, 4.0, 1.0]]), 6)[0]
    assert np.argwhere(mask).tolist() == [[1, 2], [1, 3], [1, 4]]


def test_instance_norm():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3)) * 4 + 9
    y = InstanceNorm(3)(x)
    np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((1, 2)), 1, atol=1e-5)


def test_every_box_of_an_image_is_answered_as_if_alone(model):
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    boxes = jnp.array([[[2, 3, 9, 9], [10, 10, 30, 20]], [[0, 0, 31, 31], [5, 5, 6, 6]]], float)
    logits = run(model, images, boxes=boxes)
    assert logits.shape == (2, 2, 1, 32, 32)
    alone = run(model, images[1:], boxes=boxes[1:, 1:])
    np.testing.assert_allclose(logits[1, 1], alone[0, 0], atol=2e-5)
    assert jnp.abs(logits[0, 0] - logits[0, 1]).max() > 1e-3


def test_supervised_logits_double_in_size(model):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 32, 32, 3), (1, 1, 4))]
    logits = jax.eval_shape(lambda x, boxes: model.supervised_logits(x, boxes=boxes), *inputs)
    assert [one.shape for one in logits] == [(1, 1, 1, 16, 16), (1, 1, 1, 32, 32)]


def test_without_box_channel_the_box_changes_nothing():
    config = UNetConfig("u", (4, 8, 8), False, 2, 32)
    model = build(config)
    image = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3))
    one, other = run(model, image, boxes=jnp.array([[[1.0, 1, 5, 5]]])), run(model, image)
    np.testing.assert_array_equal(one, other)


def test_prompts_it_cannot_take_are_refused(model):
    with pytest.raises(UserError, match="a U-Net takes a box and nothing else"):
        model.decode(jnp.ones((1, 32, 32, 3)))


def test_checkpoint_round_trip(model, tmp_path):
    save_model(tmp_path / "u", flatten_state(model), model.config, {"licence": "Apache-2.0"})
    loaded = load_model(tmp_path / "u")
    assert loaded.config == model.config
    for name, value in flatten_state(model).items():
        np.testing.assert_array_equal(flatten_state(loaded)[name], value)


def test_published_size():
    """nnU-Net's 2D configuration for 256 x 256: seven stages, some 20 to 30 million parameters."""
    count = sum(np.prod(v.shape) for v in flatten_state(abstract_model(UNetConfig())).values())
    assert 20e6 < count < 35e6


def test_it_learns_a_slice(model):
    """On one slice: the bright disc in the box, not the one outside."""
    rows, columns = np.ogrid[:32, :32]
    disc = (rows - 10) ** 2 + (columns - 10) ** 2 < 25
    image = jnp.float32(np.repeat((disc | disc[::-1])[None, ..., None], 3, axis=3))
    boxes = jnp.array([[[5.0, 5, 15, 15]]])
    functional, tx = Functional(model), optax.adam(1e-2)

    def loss(arrays):
        logits = functional.bind(arrays).decode(image, boxes=boxes)[0][0, 0, 0]
        return optax.sigmoid_binary_cross_entropy(logits, disc.astype(float)).mean(), logits

    def step(carry, _):
        arrays, state = carry
        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        updates, state = tx.update(gradients, state)
        return (optax.apply_updates(arrays, updates), state), dice(logits > 0, jnp.asarray(disc))

    @jax.jit
    def train(arrays):
        return jax.lax.scan(step, (arrays, tx.init(arrays)), length=40)[1]

    scores = train(functional.arrays)
    assert scores[-1] > 0.95 > scores[0]
