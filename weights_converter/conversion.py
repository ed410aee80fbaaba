"""Converts a checkpoint file to this library's parameters and back.

The intermediate form is `StateDict`: all tensors, not read yet, with segment_anything's names and
PyTorch's axis order. Reading a file checks it against a model and returns a `StateDict`; writing
starts from one.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.tensors import DTYPE_NAMES, LazyTensor, TensorFile, reading
from medsam_jax.models import checkpoint
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.sam import SamConfig
from weights_converter import architectures, contract, mismatch, names

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class StateDict:
    """Tensors of a SAM in PyTorch's layout, and their source.

    Attributes:
      config: the model they were checked against.
      tensors: keyed by segment_anything's names, in the source's order; extra entries included.
      source: `source` of model.json: file, format, naming, wrapper, prefix, keys, sha256.
      metadata: further entries of model.json (licence, training facts).
    """

    config: SamConfig
    tensors: dict[str, LazyTensor]
    source: dict[str, Any]
    metadata: dict[str, Any]


class Params(Mapping[str, np.ndarray]):
    """Mapping of our parameters that reads and transposes a tensor on access."""

    def __init__(self, state: StateDict):
        self.leaves = _leaves(state.config)
        self.tensors = state.tensors

    def __getitem__(self, path: str) -> np.ndarray:
        name, leaf, _ = self.leaves[path]
        return leaf.to_ours(self.tensors[name].read())

    def __iter__(self) -> Iterator[str]:
        tensors = {path: self.tensors[name] for path, (name, *_) in self.leaves.items()}
        for path, _ in zip(self.leaves, reading(tensors, "writing arrays"), strict=True):
            yield path

    def __len__(self) -> int:
        return len(self.leaves)


def state_dict_from_file(file: TensorFile, config: SamConfig | None = None) -> StateDict:
    """Checks the tensors of a file against a model, recognised by their names if not given.

    Raises:
      UserError: not a SAM's tensors, or tensors that are unknown, missing or of the wrong shape or
        type. The message lists all of them.
    """
    naming = names.detect_naming(file.tensors)
    if naming is None:
        raise UserError(f"{file.path}: {names.strangers(file.tensors)}")
    tensors, unknown = _under_our_names(file, naming)
    if config is None:
        config = architectures.ARCHITECTURES[architectures.detect(tensors, file.path)].config()
    config = architectures.at_size_of(config, tensors)
    _check(file.path, config, naming, tensors, unknown)
    for name, *_ in _leaves(config).values():
        tensors[name] = _finite(f"{file.path}: {_theirs(naming, name)}", tensors[name])
    source = {
        "file": file.path.rsplit("/", 1)[-1],
        "format": file.format,
        "naming": naming,
        "wrapper": file.wrapper,
        "prefix": file.prefix,
        "keys": list(file.tensors),
    }
    return StateDict(config, tensors, source, {})


def state_dict_from_directory(directory: str) -> StateDict:
    """Reads the tensors of a checkpoint directory. Raises UserError if it is damaged."""
    metadata = checkpoint.read_metadata(directory)
    config = checkpoint.read_config(directory)
    if not isinstance(config, SamConfig):
        raise UserError(f"{directory}: a {type(config).__name__} has no PyTorch form; only SAM has")
    params, extras = checkpoint.read_params(directory), checkpoint.read_extras(directory)
    leaves = _leaves(config)
    checkpoint.check_same({path: shape for path, (*_, shape) in leaves.items()}, params, directory)
    tensors = {
        name: LazyTensor.of(leaf.to_torch(params[path])) for path, (name, leaf, _) in leaves.items()
    }
    tensors |= extras
    source = metadata.get("source", {})
    order = [names.from_naming(key, source["naming"]) for key in source.get("keys", ())]
    tensors = {name: tensors[name] for name in dict.fromkeys([*order, *tensors]) if name in tensors}
    return StateDict(config, tensors, source, contract.metadata_of(metadata))


def save_directory(state: StateDict, directory: str, overwrite: bool = False) -> None:
    """Writes a checkpoint directory. Raises UserError if it exists and `overwrite` is false."""
    leaves = {name for name, *_ in _leaves(state.config).values()}
    extras = {name: tensor for name, tensor in state.tensors.items() if name not in leaves}
    metadata = {"source": state.source, **state.metadata}
    checkpoint.save_model(directory, Params(state), state.config, metadata, extras, overwrite)


def in_naming(state: StateDict, naming: str) -> dict[str, LazyTensor]:
    """Returns the tensors with the names of `naming`. If the source used the same naming, keys and
    order are those of the source.

    Raises:
      UserError: a tensor has no name in `naming` (LiteMedSAM in `transformers`).
    """
    renamed = {names.to_naming(name, naming): tensor for name, tensor in state.tensors.items()}
    if None in renamed:
        lost = [name for name in state.tensors if names.to_naming(name, naming) is None]
        raise UserError(
            f"naming {naming} has no name for {len(lost)} tensors of {state.config.name} (first "
            f"{lost[0]}); write it with --naming {names.SEGMENT_ANYTHING}"
        )
    if naming == names.TRANSFORMERS:
        renamed |= {alias: renamed[name] for alias, name in names.ALIASES.items()}
    if state.source.get("naming") == naming and set(state.source["keys"]) <= set(renamed):
        return {key: renamed[key] for key in state.source["keys"]}
    return renamed


@functools.cache
def _leaves(config: SamConfig) -> dict[str, tuple[str, names.Leaf, tuple[int, ...]]]:
    """Maps our path to segment_anything's name, the rule for its values and our shape."""
    template = flatten_state(checkpoint.abstract_model(config))
    return {
        path: (*names.torch_leaf(path, len(variable.shape)), variable.shape)
        for path, variable in template.items()
    }


def _under_our_names(file: TensorFile, naming: str) -> tuple[dict[str, LazyTensor], list[str]]:
    """Returns tensors keyed by segment_anything's names, and the names that `naming` lacks."""
    tensors: dict[str, LazyTensor] = {}
    unknown = []
    for key, tensor in file.tensors.items():
        name = names.from_naming(key, naming)
        if name is None:
            unknown.append(key)
        elif name not in tensors:
            tensors[name] = tensor
        elif not _same(tensors[name], tensor):
            raise UserError(f"{file.path}: {key} and its other name hold different values")
    return tensors, unknown


def _finite(name: str, tensor: LazyTensor) -> LazyTensor:
    """Returns the tensor; reading it raises UserError for NaN and infinity."""

    def read() -> np.ndarray:
        value = tensor.read()
        checkpoint.check_finite(value, name)
        return value

    return dataclasses.replace(tensor, read=read)


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()


def _theirs(naming: str, name: str) -> str:
    return names.to_naming(name, naming) or name


def _check(
    path: str,
    config: SamConfig,
    naming: str,
    tensors: Mapping[str, LazyTensor],
    unknown: list[str],
) -> None:
    wanted = {name: leaf.torch_shape(shape) for name, leaf, shape in _leaves(config).values()}
    theirs = functools.partial(_theirs, naming)
    unused = unknown + [
        theirs(name) for name in tensors if name not in wanted and not names.EXTRAS.fullmatch(name)
    ]
    unfilled = [theirs(name) for name in wanted if name not in tensors]
    wrong = []
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape != shape:
            wrong.append(f"{theirs(name)}: shape {tensor.shape}, the model has {shape}")
        elif tensor is not None and DTYPE_NAMES[tensor.dtype] not in _FLOATS:
            wrong.append(f"{theirs(name)}: elements of type {tensor.dtype}, no floating point")
    if unused or unfilled or wrong:
        report = mismatch.describe(unused, unfilled, wrong, map(theirs, wanted))
        raise UserError(f"{path}: does not fit {config.name}: {report}")
