"""The activation of SAM's networks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@partial(jax.checkpoint, prevent_cse=False)
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU in PyTorch's form; the tanh form differs from it by up to 4.7e-4.

    Computed in float32, as PyTorch does; a gradient keeps `x` alone.
    """
    wide = x.astype(jnp.float32)
    normal_cdf = 0.5 * (1.0 + jax.lax.erf(wide * np.float32(np.sqrt(0.5))))
    return (wide * normal_cdf).astype(x.dtype)
