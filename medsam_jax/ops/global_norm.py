"""Norm over all arrays of a model."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from medsam_jax.ops.form import Form

_SMALL = 1 << 19  # elements


def global_norm(arrays: Any, form: Form) -> Float[Array, ""]:
    """Returns the square root of a tree's sum of squares. Plain form: `optax.tree.norm(arrays)`.

    An accelerator starts a kernel or two for each array, and a decoder has a hundred small ones.
    Its form joins these first. On a mesh that splits arrays it does not: they would be gathered.
    """
    split = form.mesh is not None and form.mesh.shape.get("fsdp", 1) > 1
    if form.device != "accelerator" or split:
        return optax.tree.norm(arrays)
    leaves = jax.tree.leaves(arrays)
    small = [x.ravel() for x in leaves if x.size <= _SMALL]
    large = [x for x in leaves if x.size > _SMALL]
    joined = [jax.lax.optimization_barrier(jnp.concatenate(small))] if small else []
    return optax.tree.norm([*joined, *large])
