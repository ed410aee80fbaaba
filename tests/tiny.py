"""A small `Sam` with random weights: made in NumPy, as running every initialiser takes a minute."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from medsam_jax.models.checkpoint import abstract_model, build_model
from medsam_jax.models.functional import Functional, derive, flatten_state
from medsam_jax.models.sam import Sam, SamConfig


def tiny_sam(seed: int = 0, config: SamConfig | None = None) -> Sam:
    """`config` (by default `SamConfig.tiny()`) with weights of the usual scale."""
    config = config or SamConfig.tiny()
    rng = np.random.default_rng(seed)
    shapes = {name: x.shape for name, x in flatten_state(abstract_model(config)).items()}
    return build_model(config, {n: _draw(n, s, rng) for n, s in shapes.items()}, "random")


def update_state(module: nnx.Module, values: Mapping[str, np.ndarray | jnp.ndarray]) -> None:
    """Sets variables of a module by dotted path."""
    functional = Functional(module)
    for name, value in values.items():
        assert functional.arrays[name].shape == value.shape, name
    new = {name: jnp.asarray(value) for name, value in values.items()}
    nnx.update(module, nnx.state(functional.bind(functional.arrays | new)))
    derive(module)


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    leaf = name.rsplit(".", 1)[1]
    if leaf in ("scale", "var"):
        return np.ones(shape, np.float32)
    if leaf in ("bias", "mean"):
        return np.zeros(shape, np.float32)
    fan_in = math.prod(shape[:-1]) if leaf == "kernel" else 1
    return rng.normal(0, 1 / math.sqrt(fan_in), shape).astype(np.float32)
