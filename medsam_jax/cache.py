"""What is kept between runs: downloads, converted weights and compiled programs."""

import os
from pathlib import Path


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
