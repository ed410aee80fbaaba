"""Processes the prompts of an image one by one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from medsam_jax.ops.form import Form


def one_prompt_after_another(function: Callable[..., Any], prompts: Any, form: Form) -> Any:
    """Applies a function to arrays [B, P, ...]. Plain form: `function(*prompts)`.

    The decoder's pixels of one prompt fit a CPU's cache from layer to layer. Those of 64 prompts
    take half a gigabyte per layer.

    `function` returns arrays [B, P, ...], where each prompt's results depend on that prompt only.
    `prompts` are its arguments, arrays or None; one with P = 1 is shared by all prompts.
    """
    count = max(x.shape[1] for x in jax.tree.leaves(prompts))
    if not form.cpu or count == 1:
        return function(*prompts)
    leaves, structure = jax.tree.flatten(prompts)
    own = [jnp.moveaxis(x, 1, 0)[:, :, None] for x in leaves if x.shape[1] > 1]  # [P, B, 1, ...]

    def of_prompt(own: list) -> Any:
        rest = iter(own)
        return function(
            *jax.tree.unflatten(structure, [x if x.shape[1] == 1 else next(rest) for x in leaves])
        )

    results = jax.lax.map(of_prompt, own)
    return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), results)
