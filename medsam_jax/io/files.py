"""Files written whole or not at all, disk space, and the folder of what is kept between runs."""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medsam_jax.errors import OutputError, UserError


def cache_directory() -> Path:
    """`$MEDSAM_JAX_CACHE`, or `~/.cache/medsam_jax`."""
    return Path(os.environ.get("MEDSAM_JAX_CACHE") or Path.home() / ".cache" / "medsam_jax")


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache: a command's next start compiles nothing anew.

    Environment variables of jax's own, such as `$JAX_COMPILATION_CACHE_DIR`, win where they are
    set.
    """
    import jax

    settings = {
        "jax_compilation_cache_dir": str(cache_directory() / "xla"),
        # jax keeps what took a second; the decoder takes less on a quick machine.
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


@contextlib.contextmanager
def disk_space(place: str | os.PathLike) -> Iterator[None]:
    """Turns a disk that is full while the block writes into a `UserError` that names `place`."""
    try:
        yield
    except Exception as error:  # ArrayRecord and TensorStore raise kinds of their own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left" not in str(error) and "quota exceeded" not in str(error):
            raise
        raise UserError(
            f"{place}: the disk is full; free some space and give the same command again"
        ) from None


def require_space(place: str | os.PathLike, needed: int, what: str) -> None:
    """Refuses to start writing `needed` bytes into a directory whose disk has less left.

    Raises:
      UserError: naming the directory and both sizes.
    """
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place}: {what} need {needed / 2**30:.2f} GiB and {free / 2**30:.2f} are free; free "
            "some space or name another directory"
        )


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes under another name first; the suffix stays, since it selects the format.

    Raises:
      OutputError: the folder cannot be made or written to.
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
    """Raises OutputError, before any work, where a folder can be neither made nor written to."""
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
    """Writes JSON; numbers that are not finite become null."""
    text = json.dumps(jsonable(content), indent=2, allow_nan=False)
    write_text(path, text + "\n")


def jsonable(value: Any) -> Any:
    """What `json.loads` would give back: keys are strings, tuples lists, NaN and infinity None."""
    if isinstance(value, dict):
        return {str(key): jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def replacing(directory: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary sibling that takes the place of `directory` when the block succeeds."""
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
