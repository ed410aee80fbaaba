"""Dense convolution: the CPU's form against jax's own, alone and in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops.convolution import conv3x3
from medsam_jax.ops.form import CPU, PLAIN


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, KERNEL, WEIGHTS = random(0, 2, 5, 6, 3), random(1, 3, 3, 3, 4), random(2, 2, 5, 6, 4)


def by_definition(x, kernel):
    """Computes each output pixel in float64."""
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.empty((*x.shape[:3], kernel.shape[-1]))
    for row, column in np.ndindex(out.shape[1:3]):
        part = padded[:, row : row + 3, column : column + 3]
        out[:, row, column] = np.einsum("bijc,ijcd->bd", part, kernel)
    return out


@pytest.mark.parametrize("form", [CPU, PLAIN])
def test_values(form):
    np.testing.assert_allclose(conv3x3(X, KERNEL, form), by_definition(X, KERNEL), atol=1e-5)


@pytest.mark.parametrize("form", [CPU, PLAIN])
def test_gradients_are_the_finite_differences(form):
    """The sum is linear in each argument, so a difference in float64 is exact."""

    def total(x, kernel):
        return (by_definition(x, kernel) * WEIGHTS).sum()

    found = jax.grad(lambda *a: (conv3x3(*a, form) * WEIGHTS).sum(), argnums=(0, 1))(X, KERNEL)
    for index, gradient in enumerate(found):
        assert gradient.shape == (X, KERNEL)[index].shape
        for position in np.ndindex(gradient.shape):
            arguments = [np.array(X, np.float64), np.array(KERNEL, np.float64)]
            before = total(*arguments)
            arguments[index][position] += 1.0
            expected = total(*arguments) - before
            np.testing.assert_allclose(gradient[position], expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_in_a_loop_has_no_convolution_by_the_kernel():
    """XLA:CPU computes such a one by plain loops, a hundred times slower."""

    def program(form):
        def total(kernel):
            return jax.lax.map(lambda x: conv3x3(x[None], kernel, form), X).sum()

        return jax.jit(jax.grad(total)).lower(KERNEL).as_text()

    def by_kernel(text):
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        return [line for line in lines if "-> tensor<3x3x" in line]

    assert by_kernel(program(PLAIN)), "what jax derives has one"
    assert not by_kernel(program(CPU))
