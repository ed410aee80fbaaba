"""What is kept between runs: downloads, converted weights and compiled programs."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$MEDSAM_JAX_CACHE`, or `~/.cache/medsam_jax`."""
    return Path(os.environ.get("MEDSAM_JAX_CACHE") or Path.home() / ".cache" / "medsam_jax")


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache: a command's next start compiles nothing anew.

    `$JAX_COMPILATION_CACHE_DIR`, jax's own setting, wins where it is set.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
