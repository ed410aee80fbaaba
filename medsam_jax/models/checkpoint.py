"""Reads and writes checkpoint directories: arrays, config, preprocessing, licence and source.

```
DIRECTORY/
  model.json           architecture (with the preprocessing contract), licence, source, versions
  params/0, params/1   Orbax checkpoints of about 128 MB each, so that writing needs little memory
  extras.safetensors   entries of a PyTorch file that the model does not use, if there are any
```

A directory is written under a temporary name next to its final path, and renamed when complete.
"""

import datetime
import functools
import importlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from medsam_jax.errors import UserError
from medsam_jax.io.files import plain_path, replacing, versions
from medsam_jax.models.common import Derived
from medsam_jax.models.functional import derive, flatten_state

FORMAT_VERSION = 1
_PART_BYTES = 128 * 2**20

# `architecture.kind` in model.json -> module, configuration and model.
_KINDS = {
    "sam": ("medsam_jax.models.sam", "SamConfig", "Sam"),
    "unet": ("medsam_jax.models.unet", "UNetConfig", "UNet"),
}


def save_model(
    directory: str | os.PathLike,
    params: Mapping[str, Array | np.ndarray],
    config: Any,
    metadata: dict[str, Any],
    extras: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint directory; an existing one is replaced when the new one is complete.

    In a multi-host run only process 0 calls this, with arrays that it can address.

    Args:
      directory: path to write; its parents are created.
      params: arrays by dotted path (`functional.flatten_state`), in the types to store. They are
        read in order, one part at a time, so a lazy mapping never has to fit in memory.
      config: `SamConfig` or `UNetConfig`.
      metadata: further entries of model.json, in JSON types: `licence`, `source`, training facts.
      extras: unused entries (`medsam_jax.io.tensors.LazyTensor`), kept for export.
      overwrite: replace an existing directory.

    Raises:
      UserError: the directory exists and `overwrite` is false, it cannot be written, or the arrays
        cannot be read back from it.
    """
    with replacing(Path(directory), overwrite) as target:
        if not _write_params(target / "params", params):
            raise UserError(
                f"{directory}: what was written there cannot be read back; nothing is kept, choose "
                "another folder"
            )
        if extras:
            from medsam_jax.io.safetensors import write_safetensors

            write_safetensors(str(target / "extras.safetensors"), extras)
        (target / "model.json").write_text(
            json.dumps(description(config, metadata), indent=2) + "\n"
        )


def description(config: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of model.json for a `SamConfig` or `UNetConfig`."""
    kind = next(kind for kind, names in _KINDS.items() if type(config).__name__ == names[1])
    return {
        "format_version": FORMAT_VERSION,
        "architecture": config.to_dict() | {"kind": kind},
        **metadata,
        "created_by": _versions(),
    }


def read_metadata(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the contents of model.json.

    Raises:
      UserError: the directory is no checkpoint, is damaged, or has another format version.
    """
    path = Path(directory) / "model.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory}: not a checkpoint directory (no model.json); make one with `python -m "
            f"weights_converter.convert --input {_weights_in(directory)} --output DIRECTORY`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write the checkpoint again") from None
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r}, this program reads {FORMAT_VERSION}; convert the "
            "checkpoint again"
        )
    return metadata


def _weights_in(directory: str | os.PathLike) -> str:
    """Returns the input of the converter for a folder of another kind, such as the hub's."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        names = []
    found = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt"))]
    return f"{directory}/{found[0]}" if len(found) == 1 else str(directory) if found else "FILE"


def read_params(directory: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a checkpoint by dotted path, in their stored types.

    Raises:
      UserError: a part is missing or damaged, or an array holds NaN or infinity.
    """
    import orbax.checkpoint as ocp

    params = {}
    parts = Path(directory) / "params"
    names = sorted(filter(str.isdigit, os.listdir(parts)), key=int) if parts.is_dir() else []
    alone = _this_process_alone()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**alone), **alone) as checkpointer:
        for name in names:
            try:
                params |= _flatten(checkpointer.restore(plain_path(parts) / name))
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise UserError(
                    f"{parts / name}: cannot be read ({reason}); write the checkpoint again"
                ) from error
    if not params:
        raise UserError(f"{parts}: no parameters there; write the checkpoint again")
    for path, value in params.items():
        check_finite(value, f"{directory}: {path}")
    return params


def check_finite(value: np.ndarray, name: str) -> None:
    """Raises UserError, with `name`, for weights that hold NaN or infinity."""
    bad = value.size - int(np.count_nonzero(np.isfinite(value)))
    if bad:
        raise UserError(
            f"{name}: {bad} of {value.size} weights are NaN or infinite, of a training that "
            "diverged or of a damaged file; use an earlier checkpoint"
        )


def read_extras(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads the entries of the source file that the model does not use: name -> `LazyTensor`."""
    path = Path(directory) / "extras.safetensors"
    if not path.exists():
        return {}
    from medsam_jax.io.safetensors import read_safetensors

    return read_safetensors(str(path)).tensors


def read_config(directory: str | os.PathLike) -> Any:
    """Reads the configuration of a checkpoint, a `SamConfig` or `UNetConfig`.

    Raises:
      UserError: as `read_metadata`, or the architecture is unknown.
    """
    return config_of(read_metadata(directory), f"{directory}/model.json")


def config_of(metadata: Mapping[str, Any], place: str) -> Any:
    """Returns the configuration in the content of model.json; `place` names it in errors.

    Raises:
      UserError: the architecture is unknown or does not fit this program.
    """
    try:
        fields = dict(metadata.get("architecture", {}))
    except (TypeError, ValueError):
        raise UserError(
            f"{place}: architecture is not a table; convert the checkpoint again"
        ) from None
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise UserError(f"{place}: architecture kind {kind!r} is unknown")
    module, config_name, _ = _KINDS[kind]
    try:
        return getattr(importlib.import_module(module), config_name).from_dict(fields)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: architecture does not fit this program ({error}); convert "
            "the checkpoint again"
        ) from None


def build_model(config: Any, params: Mapping[str, np.ndarray], origin: str) -> nnx.Module:
    """Builds the model of `config` with `params`; no random weights are created.

    Args:
      config: `SamConfig` or `UNetConfig`.
      params: arrays by dotted path; cast to the model's types.
      origin: source of `params`, for the error message.

    Raises:
      UserError: paths or shapes differ from the model's.
    """
    abstract = abstract_model(config)
    shapes = {path: variable.shape for path, variable in flatten_state(abstract).items()}
    check_same(shapes, params, origin)
    graph, derived, state = nnx.split(abstract, Derived, ...)
    derived = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), derived)
    leaves = [
        (path, variable.replace(_to_device(params[".".join(map(str, path))], variable)))
        for path, variable in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graph, derived, nnx.from_flat_state(leaves))
    derive(model)
    return model


def abstract_model(config: Any) -> nnx.Module:
    """Returns the model of `config` with shapes and types instead of arrays; needs no memory."""
    return nnx.merge(*_traced(config))


@functools.cache
def _traced(config: Any) -> tuple[nnx.GraphDef, Any]:
    module, _, model_name = next(
        names for names in _KINDS.values() if names[1] == type(config).__name__
    )
    model_class = getattr(importlib.import_module(module), model_name)
    return nnx.split(nnx.eval_shape(lambda: model_class(config, rngs=_OneKey())))


class _OneKey(nnx.Rngs):
    """Constant key instead of `nnx.Rngs`, for unused values: its counters are slow to trace."""

    def __init__(self):
        """Creates no streams."""

    def params(self) -> Array:
        return jax.random.key(0)


def _to_device(value: np.ndarray, variable: nnx.Variable) -> Array:
    return jax.numpy.asarray(value, dtype=variable.dtype)


def check_same(
    shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, np.ndarray], origin: str
) -> None:
    """Checks that `params` have exactly these paths and shapes; raises UserError with `origin`."""
    problems = [f"{path} is missing" for path in shapes if path not in params]
    problems += [f"{path} is not of this model" for path in params if path not in shapes]
    problems += [
        f"{path} has shape {params[path].shape}, the model {shape}"
        for path, shape in shapes.items()
        if path in params and params[path].shape != shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        raise UserError(
            f"{origin}: {len(problems)} arrays do not fit its model.json: {shown}; convert again"
        )


def _write_params(directory: Path, params: Mapping[str, Array | np.ndarray]) -> bool:
    """Writes the parts; returns whether names, shapes and the smallest array of each are there."""
    import orbax.checkpoint as ocp

    alone = _this_process_alone()
    # Weights hardly compress, and compression makes writing slow.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, **alone)
    directory.mkdir()
    place = plain_path(directory)
    with ocp.Checkpointer(handler, **alone) as checkpointer:
        for index, part in enumerate(_parts(params)):
            checkpointer.save(place / str(index), args=ocp.args.PyTreeSave(_nest(part)))
            if not _is_readable(checkpointer, place / str(index), part):
                return False
    return True


def _is_readable(checkpointer: Any, place: Path, part: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a written part has the names and shapes of `part` and one array."""
    import orbax.checkpoint as ocp

    metadata = checkpointer.metadata(place).item_metadata
    if metadata is None:  # Orbax's answer where the arrays are not there
        return False
    found = {path: tuple(one.shape) for path, one in _leaves(metadata.tree).items()}
    if found != {path: value.shape for path, value in part.items()}:
        return False
    path, value = min(part.items(), key=lambda item: item[1].nbytes)
    wanted = ocp.args.PyTreeRestore(item=_nest({path: value}), partial_restore=True)
    (read,) = _flatten(checkpointer.restore(place, args=wanted)).values()
    return read.tobytes() == value.tobytes()


def _this_process_alone() -> dict[str, Any]:
    """Returns options with which Orbax does not wait for other processes of a multi-host run."""
    import orbax.checkpoint as ocp

    process = jax.process_index()
    if jax.process_count() == 1:
        return {}
    options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"model_{process}",
    )
    return {"multiprocessing_options": options}


def _parts(params: Mapping[str, Array | np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    part, size = {}, 0
    for path, value in params.items():
        part[path] = np.asarray(value)
        size += part[path].nbytes
        if size >= _PART_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _leaves(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _flatten(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in _leaves(tree).items()}


def _versions() -> dict[str, str]:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return versions(("medsam-jax", "jax", "flax", "orbax-checkpoint")) | {"time": time}
