"""Tests of freezing: which parameters train; frozen ones keep their bits and have no state."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from medsam_jax.errors import UserError
from medsam_jax.models.functional import Functional, flatten_state, parameter_names
from medsam_jax.models.sam import Sam, SamConfig
from medsam_jax.training import optimizer as opt
from medsam_jax.training.config import base_config, validate
from tests.tiny import tiny_sam

ENCODERS = (r"image_encoder\..*", r"prompt_encoder\..*")


@pytest.fixture(scope="module")
def tiny() -> Sam:
    return tiny_sam()


def test_mask_decoder_of_lite_medsam_is_what_is_trained():
    """4,058,340 parameters: MedSAM's own count for the mask decoder."""
    model = nnx.eval_shape(lambda: Sam(SamConfig.lite_medsam(), rngs=nnx.Rngs(0)))
    arrays = flatten_state(model)
    labels = opt.label_parameters(arrays, parameter_names(model), ENCODERS)
    trained, frozen = opt.split_frozen(arrays, labels)
    assert sum(math.prod(x.shape) for x in trained.values()) == 4_058_340
    assert all(name.startswith("mask_decoder.") for name in trained)
    assert not any(name.startswith("mask_decoder.") for name in frozen)


def test_statistics_and_buffers_are_never_trained(tiny):
    labels = opt.label_parameters(flatten_state(tiny), parameter_names(tiny), ())
    frozen = {name for name, label in labels.items() if label == opt.FROZEN}
    kinds = {name.rsplit(".", 1)[1] for name in frozen}
    assert kinds == {"mean", "var", "positional_encoding_gaussian_matrix"}


def test_frozen_arrays_keep_their_bits_and_have_no_state(tiny):
    arrays = Functional(tiny).arrays
    name = "image_encoder.neck.1.bias"
    arrays[name] = jnp.full_like(arrays[name], -0.0)  # -0.0 + 0.0 would be 0.0
    config = base_config()
    labels = opt.label_parameters(arrays, parameter_names(tiny), ENCODERS)
    tx = opt.make_optimizer(config, labels)
    state = tx.init(arrays)
    trained, frozen = opt.split_frozen(arrays, labels)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trained.values())

    step = jax.jit(lambda a, s, g: opt.apply_gradients(tx, a, g, s))
    after = arrays
    for seed in range(3):
        key = jax.random.key(seed)
        gradients = {name: jax.random.normal(key, x.shape) for name, x in trained.items()}
        after, state, _ = step(after, state, gradients)
    for name, before in frozen.items():
        assert np.asarray(after[name]).tobytes() == np.asarray(before).tobytes(), name
    for name, before in trained.items():
        assert not np.array_equal(after[name], before), name


def test_adamw_decays_kernels_only():
    """One step on zero gradients: only the decay acts, and only on kernels."""
    arrays = {"a.kernel": jnp.ones((2, 2)), "a.bias": jnp.ones((2,)), "b.scale": jnp.ones((2,))}
    config = base_config()
    config.learning_rate, config.weight_decay = 0.5, 0.1
    labels = opt.label_parameters(arrays, arrays, ())
    tx = opt.make_optimizer(config, labels)
    zeros = jax.tree.map(jnp.zeros_like, arrays)
    after, _, norm = opt.apply_gradients(tx, arrays, zeros, tx.init(arrays))
    np.testing.assert_allclose(after["a.kernel"], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["a.bias"], 1.0)
    np.testing.assert_array_equal(after["b.scale"], 1.0)
    np.testing.assert_allclose(norm, 2 * 0.05, rtol=1e-5)


def test_first_adam_step_is_the_learning_rate_against_the_gradient():
    arrays = {"a.kernel": jnp.zeros((3,))}
    config = base_config()
    config.optimizer, config.learning_rate, config.clip_norm = "adam", 0.25, 0.0
    tx = opt.make_optimizer(config, opt.label_parameters(arrays, arrays, ()))
    gradients = {"a.kernel": jnp.array([3.0, -0.2, 1e-3])}
    after, _, _ = opt.apply_gradients(tx, arrays, gradients, tx.init(arrays))
    np.testing.assert_allclose(after["a.kernel"], [-0.25, 0.25, -0.25], rtol=1e-4)


@pytest.mark.parametrize(("optimizer", "schedule"), [("adamw", "cosine"), ("adam", "constant")])
def test_the_recipes_optimisers_are_this_chain_to_the_bit(optimizer, schedule):
    arrays = {"a.kernel": jnp.ones((3, 2)), "a.bias": jnp.ones((3,)), "b.kernel": jnp.ones((4, 4))}
    config = base_config()
    config.optimizer, config.schedule, config.warmup_steps = optimizer, schedule, 2
    config.learning_rate, config.num_steps, config.learning_rates = 0.1, 6, (("b.*", 0.5),)
    labels = opt.label_parameters(arrays, arrays, ())
    after = optax.constant_schedule(0.1)
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(0.1, 4)
    rate = optax.join_schedules([optax.linear_schedule(0.0, 0.1, 2), after], [2])
    decay = optax.add_decayed_weights(0.01) if optimizer == "adamw" else optax.identity()
    expected = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.999),
        optax.masked(decay, {"a.kernel": True, "a.bias": False, "b.kernel": True}),
        optax.scale_by_learning_rate(rate),
        optax.masked(optax.scale(0.5), {"a.kernel": False, "a.bias": False, "b.kernel": True}),
    )
    tx = opt.make_optimizer(config, labels)
    state, expected_state, theirs = tx.init(arrays), expected.init(arrays), arrays
    for seed in range(6):
        gradients = {n: jax.random.normal(jax.random.key(seed), x.shape) for n, x in arrays.items()}
        arrays, state, _ = opt.apply_gradients(tx, arrays, gradients, state)
        updates, expected_state = expected.update(gradients, expected_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for name, value in theirs.items():
        assert np.asarray(arrays[name]).tobytes() == np.asarray(value).tobytes(), name
        assert not np.array_equal(value, jnp.ones_like(value))


def test_any_optimiser_and_schedule_of_optax_by_name():
    """Momentum by hand: the second step is rate * (gradient + 0.9 * gradient)."""
    arrays = {"a.kernel": jnp.zeros((2,))}
    config = base_config()
    config.optimizer, config.optimizer_args.momentum = "sgd", 0.9
    config.schedule, config.schedule_args = "exponential", {"decay_rate": 0.25}
    config.learning_rate, config.num_steps, config.clip_norm = 0.5, 2, 0.0
    tx = opt.make_optimizer(config, opt.label_parameters(arrays, arrays, ()))
    state, gradients = tx.init(arrays), {"a.kernel": jnp.array([1.0, -2.0])}
    for expected in (-0.5, -0.5 - 0.5 * 0.25**0.5 * 1.9):
        arrays, state, _ = opt.apply_gradients(tx, arrays, gradients, state)
        np.testing.assert_allclose(arrays["a.kernel"], [expected, -2 * expected], rtol=1e-6)


@pytest.mark.parametrize("name", ["lion", "lamb", "adafactor", "lars"])
def test_other_optimisers_decay_kernels_only(name):
    arrays = {"a.kernel": jnp.ones((2, 2)), "a.bias": jnp.ones((2,))}
    config = base_config()
    config.optimizer, config.weight_decay = name, 0.1
    if name == "adafactor":  # its own name for it
        config.optimizer_args = {"weight_decay_rate": 0.1}
    tx = opt.make_optimizer(config, opt.label_parameters(arrays, arrays, ()))
    zeros = jax.tree.map(jnp.zeros_like, arrays)
    after, _, _ = opt.apply_gradients(tx, arrays, zeros, tx.init(arrays))
    assert (after["a.kernel"] < 1).all()
    np.testing.assert_array_equal(after["a.bias"], 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adamW"}, "config.optimizer: 'adamW' is not in optax; use one of .*adamw"),
        ({"optimizer": "apply_updates"}, "config.optimizer: 'apply_updates' is not in optax"),
        ({"optimizer": "lbfgs"}, "config.optimizer: 'lbfgs' with {} takes no step from gradients"),
        ({"optimizer_args": {"beta1": 0.9}}, "adamw of optax has no argument 'beta1'; it has .*b1"),
        ({"schedule": "join"}, "config.schedule: 'join' is not in optax; use one of .*cosine"),
        ({"schedule": "exponential"}, "config.schedule_args: {} given; .*'decay_rate'"),
        ({"schedule": "cosine", "schedule_args": {"alfa": 0}}, "no argument 'alfa'; it has alpha"),
    ],
)
def test_what_optax_lacks_is_refused_in_one_line(fields, message):
    config = base_config()
    config.update({"data_dir": "somewhere"} | fields)
    with pytest.raises(UserError, match=message) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_schedule_warms_up_then_falls_to_zero():
    config = base_config()
    config.schedule, config.warmup_steps, config.num_steps = "cosine", 10, 110
    config.learning_rate = 1e-3
    rate = opt.learning_rate_schedule(config)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 5e-4, 1e-3, 5e-4, 0], atol=1e-9
    )
    config.schedule, config.warmup_steps = "constant", 0
    assert float(opt.learning_rate_schedule(config)(7)) == pytest.approx(1e-3)


def test_clipping_bounds_the_gradient_that_adam_sees():
    arrays = {"a.kernel": jnp.zeros((4,)), "b.kernel": jnp.zeros((4,))}
    config = base_config()
    config.clip_norm = 1.0
    labels = opt.label_parameters(arrays, arrays, (r"b\..*",))
    tx = opt.make_optimizer(config, labels)
    _, state, _ = opt.apply_gradients(
        tx, arrays, {"a.kernel": jnp.full((4,), 50.0)}, tx.init(arrays)
    )
    first_moment = optax.tree.get(state, "mu")["a.kernel"]
    np.testing.assert_allclose(first_moment, 0.1 * 0.5, rtol=1e-6)  # (1 - beta1) * 50 / 100


def test_parts_have_learning_rates_of_their_own():
    """The first Adam step is the rate; the first regex that matches gives its factor."""
    arrays = {name: jnp.zeros((3,)) for name in ("a.kernel", "a.bias", "b.kernel", "c.kernel")}
    config = base_config()
    config.optimizer, config.learning_rate, config.clip_norm = "adam", 0.5, 0.0
    config.learning_rates = ((r"a\.bias", 4.0), (r"a\..*", 0.1), (r"b.*", 2.0))
    labels = opt.label_parameters(arrays, arrays, ())
    tx = opt.make_optimizer(config, labels)
    gradients = jax.tree.map(jnp.ones_like, arrays)
    after, _, _ = opt.apply_gradients(tx, arrays, gradients, tx.init(arrays))
    found = {name: -float(value[0]) for name, value in after.items()}
    expected = {"a.kernel": 0.05, "a.bias": 2.0, "b.kernel": 1.0, "c.kernel": 0.5}
    assert found == pytest.approx(expected, rel=1e-5)

    labels = opt.label_parameters(arrays, arrays, (r"b\..*",))
    with pytest.raises(UserError, match="config.learning_rates: 'b.*' matches no trained"):
        opt.make_optimizer(config, labels)


def test_the_table_counts_numbers_and_bytes_of_each_part():
    arrays = {"a.kernel": jnp.zeros((256, 1024)), "b.kernel": jnp.zeros((512, 1024))}
    labels = opt.label_parameters(arrays, arrays, (r"b\..*",))
    state = opt.make_optimizer(base_config(), labels).init(arrays)
    rows = [line.split() for line in opt.parameter_table(arrays, labels, state).splitlines()]
    assert rows[1:] == [
        ["a", "262,144", "0", "1.0", "0.0", "2.0"],
        ["b", "0", "524,288", "0.0", "2.0", "0.0"],
        ["sum", "262,144", "524,288", "1.0", "2.0", "2.0"],
    ]


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ((r"image_encoder",), "'image_encoder' matches no variable"),
        ((r"(",), "no regular expression"),
        ((r".*",), "nothing is left to train"),
    ],
)
def test_bad_patterns_are_refused(tiny, frozen, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        opt.label_parameters(flatten_state(tiny), parameter_names(tiny), frozen)
