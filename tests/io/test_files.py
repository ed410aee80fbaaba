"""Compiled programs outlive the process that compiled them."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import jax
from medsam_jax.io.files import keep_compiled_programs
keep_compiled_programs()
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
"""


def compiled_files(folder: Path) -> set[str]:
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["MEDSAM_JAX_CACHE"] = str(folder)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # quick ones too
    subprocess.run([sys.executable, "-c", CODE], cwd=root, check=True, env=environment)
    return {path.name for path in folder.rglob("*-cache")}


def test_a_second_process_compiles_nothing_anew(tmp_path):
    first = compiled_files(tmp_path)
    assert first
    assert compiled_files(tmp_path) == first
