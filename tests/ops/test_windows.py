"""Windows of a map whose number of tokens is no multiple of 8."""

import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops.form import ACCELERATOR, PLAIN
from medsam_jax.ops.windows import attend_in_windows


@pytest.mark.parametrize(("side", "windows"), [(5, 8), (9, 16), (6, 8)])
def test_windows_are_added_for_accelerators(side, windows):
    """4 or 9 windows of 9 tokens become 8 or 16; the added ones leave no trace."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, side, side, 4)), jnp.float32)
    shapes = []

    def attention(x):
        shapes.append(x.shape)
        return x - x.mean(axis=(1, 2), keepdims=True)

    plain = attend_in_windows(attention, x, 3, PLAIN)
    np.testing.assert_array_equal(attend_in_windows(attention, x, 3, ACCELERATOR), plain)
    assert shapes[1] == (windows, 3, 3, 4)
