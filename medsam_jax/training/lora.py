"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), on the encoder's attention as in SAMed.

An adapter is two arrays A [in, rank] and B [rank, out] of a frozen kernel W [in, out]. The model
computes with W + alpha / rank * A @ B. The step makes this sum before it binds the model, so the
model code has no adapters. An export is a plain checkpoint; a training state holds A and B.
Differences: weights are added instead of outputs, so the adapter's input has no dropout. A step
takes the time of training the kernels and the memory of training the adapters.
"""

import math
import re
import zlib
from collections.abc import Iterable, Mapping

import jax
import ml_collections
import numpy as np
from flax import nnx

from medsam_jax.errors import UserError
from medsam_jax.models.functional import Functional

_A, _B = ".lora_a", ".lora_b"

Leaf = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # a variable; its shape, where abstract


class Adapted:
    """A `Functional` with adapters: `arrays` includes them, `bind` adds them to the kernels."""

    def __init__(self, functional: Functional, adapters: Mapping[str, np.ndarray], scale: float):
        self._functional, self._scale, self.form = functional, scale, functional.form
        self.arrays = {**functional.arrays, **adapters}

    def bind(self, arrays: Mapping[str, Leaf]) -> nnx.Module:
        """Returns the module with the merged arrays; also under a trace."""
        return self._functional.bind(merge(arrays, self._scale))


def adapted(functional: Functional, config: ml_collections.ConfigDict) -> Functional | Adapted:
    """Returns `functional` with the adapters of `config.lora`; unchanged if their rank is 0.

    A is drawn from the seed and B is zero, so the adapters change nothing before the first step.
    Raises UserError for a target that matches nothing, or an array that is no matrix.
    """
    rank = config.lora.rank
    if not rank:
        return functional
    adapters = {}
    for name in _targets(functional.arrays, config.lora.targets):
        rows, columns = functional.arrays[name].shape
        rng = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
        adapters[name + _A] = rng.normal(0, 1 / math.sqrt(rows), (rows, rank)).astype(np.float32)
        adapters[name + _B] = np.zeros((rank, columns), np.float32)
    return Adapted(functional, adapters, scale_of(config))


def scale_of(config: ml_collections.ConfigDict) -> float:
    """Returns alpha / rank; 0 without adapters."""
    return config.lora.alpha / config.lora.rank if config.lora.rank else 0.0


def is_adapter(name: str) -> bool:
    """True for the path of an adapter's array."""
    return name.endswith((_A, _B))


def kernel_of(name: str) -> str:
    """Returns the path of the kernel that an adapter's array belongs to."""
    return name.removesuffix(_A).removesuffix(_B)


def merge(arrays: Mapping[str, Leaf], scale: float) -> dict[str, Leaf]:
    """Returns the model's arrays, adapters added to their kernels; works on NumPy arrays too."""
    merged = {name: value for name, value in arrays.items() if not is_adapter(name)}
    for name in arrays:
        if name.endswith(_A):
            kernel = kernel_of(name)
            merged[kernel] = merged[kernel] + scale * (arrays[name] @ arrays[kernel + _B])
    return merged


def matching(field: str, regex: str, names: Iterable[str]) -> list[str]:
    """Returns the names that a regex of `config.FIELD` matches as a whole. Raises UserError."""
    try:
        return [name for name in names if re.fullmatch(regex, name)]
    except re.error as error:
        raise UserError(f"config.{field}: {regex!r} is no regular expression: {error}") from None


def _targets(arrays: Mapping[str, Leaf], regexes: Iterable[str]) -> list[str]:
    names = []
    for regex in regexes:
        found = matching("lora.targets", regex, arrays)
        if not found:
            example = next(name for name in arrays if name.endswith(".kernel"))
            raise UserError(f"config.lora.targets: {regex!r} matches no array, such as {example}")
        for name in found:
            if len(arrays[name].shape) != 2:
                raise UserError(
                    f"config.lora.targets: {regex!r} matches {name}, which is no matrix but of "
                    f"shape {arrays[name].shape}; name linear kernels"
                )
        names += found
    return list(dict.fromkeys(names))
