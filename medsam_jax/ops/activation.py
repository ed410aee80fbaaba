"""The activation of SAM's networks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@partial(jax.checkpoint, prevent_cse=False)
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, as in PyTorch; the tanh form differs from it by up to 4.7e-4.

    It is computed in float32, as in PyTorch. The gradient saves only `x`.
    """
    wide = x.astype(jnp.float32)
    normal_cdf = 0.5 * (1.0 + jax.lax.erf(wide * np.float32(np.sqrt(0.5))))
    return (wide * normal_cdf).astype(x.dtype)
