"""Atomic writes of files and directories, hashes, versions, disk space and the cache folder."""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medsam_jax.errors import OutputError, UserError

_LONGEST_NAME = 255  # bytes, on the usual file systems


def cache_directory() -> Path:
    """Returns `$MEDSAM_JAX_CACHE`, or `~/.cache/medsam_jax` if it is not set.

    Raises:
      UserError: neither the variable nor a home directory.
    """
    if chosen := os.environ.get("MEDSAM_JAX_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "medsam_jax"
    except RuntimeError:
        raise UserError(
            "cache: this user has no home directory; set MEDSAM_JAX_CACHE to a folder"
        ) from None


def writable_cache() -> Path:
    """Returns `cache_directory`. Raises UserError where it cannot be written."""
    folder = cache_directory()
    if reason := _unwritable(folder):
        raise UserError(
            f"{folder}: the cache cannot be written ({reason}); set MEDSAM_JAX_CACHE to a folder "
            "that can"
        )
    return folder


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache, so that the next start compiles nothing.

    Commands and the first `Predictor` call it. jax's own environment variables, such as
    `$JAX_COMPILATION_CACHE_DIR`, and a folder set in jax's config take precedence. Without a cache
    that can be written every start compiles, and a line says so once.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
            return
        try:
            writable_cache()
        except UserError as error:
            _note_once(f"note: programs are compiled at every start: {error}")
            return
        compilation_cache.reset_cache()  # jax decides with its first program whether there is one
    settings = {
        "jax_compilation_cache_dir": str(cache_directory() / "xla"),
        # By default jax keeps programs that take a second to compile; the decoder may take less.
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


@functools.cache
def _note_once(text: str) -> None:
    print(text, file=sys.stderr)


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
    partial = path.with_name(_prefixed(".partial-", path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        if error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"{path}: cannot be written ({reason}); use a shorter name") from None
        raise OutputError(
            f"{path.parent}: cannot be written ({reason}); free or change it"
        ) from None


def _prefixed(prefix: str, name: str, more: int = 0) -> str:
    """Returns a name for a temporary file; cuts the start of a long one, as it holds no suffix."""
    while len(os.fsencode(prefix + name)) + more > _LONGEST_NAME:
        name = name[1:]
    return prefix + name


def check_writable(output: Path) -> None:
    """Raises OutputError if a folder cannot be created or written to; call it before any work."""
    if reason := _unwritable(output):
        raise OutputError(f"{output}: cannot be written ({reason}); choose another folder")


def _unwritable(folder: Path) -> str:
    """Returns why a folder cannot be created or written to, "" where it can."""
    existing = Path(os.path.abspath(folder))
    while not os.path.lexists(existing):
        if len(os.fsencode(existing.name)) > _LONGEST_NAME:
            return "the name is too long"
        existing = existing.parent
    if not existing.exists():
        return f"{existing} is a link to nothing, or within a folder that cannot be entered"
    if not existing.is_dir():
        return f"{existing} is a file"
    if not os.access(existing, os.W_OK | os.X_OK):
        return "no permission"
    return ""


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
    """Yields a temporary sibling folder that replaces `directory` when the block succeeds.

    Raises:
      UserError: the directory exists and `overwrite` is false, or it cannot be written.
    """
    if os.path.lexists(directory) and not overwrite:
        raise UserError(f"{directory}: exists; choose another place, or overwrite it")
    check_writable(directory.parent)
    directory.parent.mkdir(parents=True, exist_ok=True)
    name = _prefixed(".", f"{directory.name}.", more=8)  # mkdtemp adds 8 characters
    scratch = Path(tempfile.mkdtemp(prefix=name, dir=directory.parent))
    try:
        target = scratch / "new"
        target.mkdir()
        yield target
        if directory.exists():
            directory.rename(scratch / "old")
        target.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def split_series(path: str) -> tuple[str, str]:
    """Splits `FOLDER#SERIES_UID`, which chooses one of a folder's DICOM series.

    Returns:
      The path of a file or folder, and the UID or "". A `#` counts only where the whole path does
      not exist and the part before it is a folder: it may be in the name of any file or folder.
    """
    folder, hash_, uid = path.rpartition("#")
    if hash_ and os.path.isdir(folder) and not os.path.lexists(path):
        return folder, uid
    return path, ""


def plain_path(folder: str | os.PathLike) -> Path:
    """Returns an absolute path of an existing folder that no library reads as a pattern.

    Orbax and TFDS search paths by patterns and read a backslash as a slash: a checkpoint below a
    folder with [ ] in its name could not be read back. Where the path has characters that may
    mislead them it is a symbolic link to the folder, kept until the process ends.
    """
    absolute = os.path.abspath(folder)
    if re.fullmatch(r"[\w/ .,@%+=#~-]*", absolute):
        return Path(absolute)
    try:
        link = Path(_links(os.getpid()).name) / hashlib.sha256(os.fsencode(absolute)).hexdigest()
        if not link.is_symlink():
            link.symlink_to(absolute)
    except OSError as error:
        raise UserError(
            f"{folder}: needs a link in a temporary folder, as its name has special characters, "
            f"and there is none ({error.strerror or error}); use letters, digits, - and _"
        ) from None
    return link


@functools.cache
def _links(process: int) -> tempfile.TemporaryDirectory:
    """Returns the folder of `plain_path`'s links, a process's own; it is removed at its end."""
    del process
    return tempfile.TemporaryDirectory(prefix="medsam_jax-")
