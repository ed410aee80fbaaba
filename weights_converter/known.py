"""Known weights by name, as a checkpoint directory that is made once and kept."""

import contextlib
import dataclasses
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.errors import UserError
from medsam_jax.io.files import cache_directory, sha256_of
from medsam_jax.models import checkpoint
from medsam_jax.models.sam import SamConfig
from weights_converter import conversion, fetch, readers
from weights_converter.architectures import ARCHITECTURES
from weights_converter.registry import REGISTRY, KnownWeights


def known_config(name: str) -> SamConfig:
    """The configuration of known weights, with the preprocessing they were trained with."""
    known = REGISTRY[name]
    return dataclasses.replace(
        ARCHITECTURES[known.architecture].config(),
        name=name,
        preprocessing=PREPROCESSING[known.preprocessing],
    )


def known_metadata(known: KnownWeights) -> dict[str, str]:
    """What model.json says of known weights beside their source."""
    return {"licence": known.licence, "credit": known.credit}


def converted_directory(name: str) -> Path:
    """The checkpoint directory of known weights in the cache; fetched and converted if need be.

    Raises:
      UserError: unknown name, or no verified file to be had.
    """
    known = fetch.lookup(name)
    directory = cache_directory() / "models" / name
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
    """Processes of one run ask for the same weights at once; the first makes them, others wait."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f".{directory.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file, also when a process dies
        yield


def _is_current(directory: Path, name: str, known: KnownWeights) -> bool:
    """Whether a directory was made from this file for this configuration."""
    if not directory.is_dir():
        return False
    try:
        source = checkpoint.read_metadata(directory).get("source", {})
        config = checkpoint.read_config(directory)
    except UserError:
        return False  # of another version of this program: made anew
    return config == known_config(name) and known.sha256 in (None, source.get("sha256"))
