"""Atomic writes of files and directories, hashes, versions, disk space and the cache folder."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medsam_jax.errors import OutputError, UserError


def cache_directory() -> Path:
    """Returns `$MEDSAM_JAX_CACHE`, or `~/.cache/medsam_jax` if it is not set."""
    return Path(os.environ.get("MEDSAM_JAX_CACHE") or Path.home() / ".cache" / "medsam_jax")


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache, so that the next start compiles nothing.

    jax's own environment variables, such as `$JAX_COMPILATION_CACHE_DIR`, take precedence.
    """
    import jax

    settings = {
        "jax_compilation_cache_dir": str(cache_directory() / "xla"),
        # By default jax keeps programs that take a second to compile; the decoder may take less.
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def require_space(place: str | os.PathLike, needed: int, what: str) -> None:
    """Checks that the disk of a directory has `needed` free bytes.

    Raises:
      UserError: too little space; the message has the directory and both sizes.
    """
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place}: {what} need {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free; free "
            "some space or name another directory"
        )


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` on a temporary file, then renames it; the suffix selects the format.

    Raises:
      OutputError: the folder cannot be created or written to.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{path.parent}: cannot be written ({reason}); free or change it"
        ) from None


def check_writable(output: Path) -> None:
    """Raises OutputError if a folder cannot be created or written to; call it before any work."""
    existing = output
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{output}: cannot be written ({existing} is a file); name a folder")
    if not os.access(existing, os.W_OK):
        raise OutputError(f"{output}: cannot be written (no permission); choose another folder")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; NaN and infinity become null."""
    text = json.dumps(jsonable(content), indent=2, allow_nan=False)
    write_text(path, text + "\n")


def sha256_of(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Returns the SHA-256 of JSON-able data in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the installed ones among `packages`."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def jsonable(value: Any) -> Any:
    """Converts a value to JSON types: string keys, lists, None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(directory: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary sibling folder that replaces `directory` when the block succeeds."""
    if directory.exists() and not overwrite:
        raise UserError(f"{directory}: exists; choose another place, or overwrite it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        target = scratch / "new"
        target.mkdir()
        yield target
        if directory.exists():
            directory.rename(scratch / "old")
        target.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
