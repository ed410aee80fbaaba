"""Layers that the models share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.models.common import gelu


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
def test_gelu_and_its_gradient_round_once(dtype, tolerance):
    x = jnp.linspace(-4, 4, 101, dtype=dtype)
    value, pull_back = jax.vjp(gelu, x)
    (slope,) = pull_back(jnp.ones_like(x))
    assert value.dtype == slope.dtype == dtype

    def exact(x):
        return jax.nn.gelu(x, approximate=False)

    wide = x.astype(jnp.float32)
    for found, expected in ((value, exact(wide)), (slope, jax.vmap(jax.grad(exact))(wide))):
        found = found.astype(jnp.float32)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-6)
