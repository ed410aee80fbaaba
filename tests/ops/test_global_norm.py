"""Norm over all arrays, in each form, and the clipping that uses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from medsam_jax.ops.form import ACCELERATOR, CPU, PLAIN, Form
from medsam_jax.ops.global_norm import global_norm
from medsam_jax.training import optimizer as opt
from medsam_jax.training.config import base_config

SPLIT = dataclasses.replace(ACCELERATOR, mesh=AbstractMesh((1, 4), ("data", "fsdp")))


def arrays() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(7,), (3, 5), (), *[(11,)] * 30, (800, 700)]  # the last one is large
    return {str(i): jnp.asarray(rng.standard_normal(s), jnp.float32) for i, s in enumerate(shapes)}


@pytest.mark.parametrize(
    "form", [PLAIN, CPU, ACCELERATOR, SPLIT], ids=["plain", "cpu", "acc", "fsdp"]
)
def test_the_norm_of_each_form(form):
    given = arrays()
    expected = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in given.values()))
    np.testing.assert_allclose(global_norm(given, form), expected, rtol=1e-6)


def sums(form: Form) -> int:
    """Number of reductions in the program."""
    text = jax.jit(lambda x: global_norm(x, form)).lower(arrays()).as_text()
    return text.count("stablehlo.reduce(")


def test_small_arrays_are_summed_together_where_they_are_whole():
    assert sums(ACCELERATOR) == 2
    assert sums(SPLIT) == sums(PLAIN) > 30


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_clipping_is_that_of_optax(norm):
    config = base_config()
    config.clip_norm, config.optimizer, config.learning_rate = norm, "sgd", 1.0
    given = arrays()
    labels = dict.fromkeys(given, opt.DECAYED)
    expected, _ = optax.clip_by_global_norm(norm).update(given, optax.EmptyState())
    for form in (PLAIN, ACCELERATOR):
        tx = opt.make_optimizer(config, labels, form)
        found, _ = tx.update(given, tx.init(given), given)
        for name in given:
            np.testing.assert_allclose(found[name], -expected[name], rtol=1e-5)
