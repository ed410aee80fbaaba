"""Converts known weights to a checkpoint directory in the cache, once for each name."""

import contextlib
import dataclasses
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.errors import UserError
from medsam_jax.io.files import cache_directory, sha256_of, writable_cache
from medsam_jax.models import checkpoint
from medsam_jax.models.sam import SamConfig
from weights_converter import conversion, fetch, readers
from weights_converter.architectures import ARCHITECTURES
from weights_converter.registry import REGISTRY, KnownWeights


def known_config(name: str) -> SamConfig:
    """Returns the configuration of known weights, with the preprocessing of their training."""
    known = REGISTRY[name]
    return dataclasses.replace(
        ARCHITECTURES[known.architecture].config(),
        name=name,
        preprocessing=PREPROCESSING[known.preprocessing],
    )


def known_metadata(known: KnownWeights) -> dict[str, str]:
    """Returns the entries of model.json for known weights, except `source`."""
    licence = known.licence if known.sha256 else "unknown"  # a file that cannot be verified
    return {"licence": licence, "credit": known.credit}


def converted_directory(name: str) -> Path:
    """Returns the cached checkpoint directory of known weights; downloads and converts if needed.

    Raises:
      UserError: unknown name, or no verified file is available.
    """
    known = fetch.lookup(name)
    directory = cache_directory() / "models" / name
    if _is_current(directory, name, known):  # also in a cache that cannot be written
        return directory
    writable_cache()
    with _one_at_a_time(directory):
        if not _is_current(directory, name, known):
            path = fetch.fetch(name)
            print(f"converting {name} into {directory}", file=sys.stderr, flush=True)
            file = readers.read_file(str(path))
            state = conversion.state_dict_from_file(file, known_config(name))
            source = state.source | {"sha256": known.sha256 or sha256_of(path)}
            state = dataclasses.replace(state, source=source, metadata=known_metadata(known))
            conversion.save_directory(state, str(directory), overwrite=True)
    return directory


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Lets one process convert the weights while the other processes of a run wait."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f".{directory.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes or the process dies
        yield


def _is_current(directory: Path, name: str, known: KnownWeights) -> bool:
    """Returns whether a directory was converted from this file for this configuration."""
    if not directory.is_dir():
        return False
    try:
        source = checkpoint.read_metadata(directory).get("source", {})
        config = checkpoint.read_config(directory)
    except UserError:
        return False  # written by another version of this program
    return config == known_config(name) and known.sha256 in (None, source.get("sha256"))
