"""LayerNorm against its definition in float64, its gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops.form import CPU, PLAIN
from medsam_jax.ops.layer_norm import layer_norm

EPSILON = 1e-5


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


X, SCALE, BIAS, WEIGHTS = (
    3 * random(0, 2, 5, 7) + 20,
    random(1, 7),
    random(2, 7),
    random(3, 2, 5, 7),
)


def norm_by_definition(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


def central_differences(function, arguments, index, step=1e-6):
    """The gradient of sum(WEIGHTS * function) by one of the arguments, in float64."""
    at = np.array(arguments[index], np.float64)
    gradient = np.empty_like(at)
    for position in np.ndindex(at.shape):
        totals = []
        for sign in (1, -1):
            moved = at.copy()
            moved[position] += sign * step
            new = [*arguments[:index], moved, *arguments[index + 1 :]]
            totals.append(np.sum(WEIGHTS * function(*new)))
        gradient[position] = (totals[0] - totals[1]) / (2 * step)
    return gradient


FORMS = pytest.mark.parametrize("form", [PLAIN, CPU], ids=lambda form: form.device)


@FORMS
def test_layer_norm(form):
    got = layer_norm(*(jnp.float32(a) for a in (X, SCALE, BIAS)), EPSILON, form)
    np.testing.assert_allclose(got, norm_by_definition(X, SCALE, BIAS), atol=1e-5)


@FORMS
@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradient_of_layer_norm(index, form):
    def total(*arguments):
        return jnp.sum(jnp.float32(WEIGHTS) * layer_norm(*arguments, EPSILON, form))

    arguments = X, SCALE, BIAS
    got = jax.jit(jax.grad(total, index))(*(jnp.float32(a) for a in arguments))
    expected = central_differences(norm_by_definition, arguments, index)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


@FORMS
def test_layer_norm_keeps_the_type_of_its_input_and_counts_in_float32(form):
    arguments = jnp.bfloat16(X), jnp.float32(SCALE), jnp.float32(BIAS)
    got, pull_back = jax.vjp(lambda *a: layer_norm(*a, EPSILON, form), *arguments)
    assert got.dtype == jnp.bfloat16
    expected = norm_by_definition(np.asarray(arguments[0], np.float64), SCALE, BIAS)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=2**-9)
    gradients = pull_back(jnp.ones_like(got))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
