"""Files and directories appear whole or not at all; hashes; versions; compiled programs."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medsam_jax.errors import OutputError, UserError
from medsam_jax.io import files

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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "first")

    def fail(partial):
        partial.write_text("half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        files.write_whole(path, fail)
    assert path.read_text() == "first"
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]
    with pytest.raises(OutputError, match="a.txt: cannot be written"):
        files.write_text(path / "below", "x")


def test_json_holds_null_for_what_is_not_finite(tmp_path):
    files.write_json(tmp_path / "a.json", {1: (float("nan"), 2.5), "b": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"1": [None, 2.5], "b": None}


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    with files.replacing(tmp_path / "d", overwrite=False) as new:
        (new / "x").write_text("1")
    with pytest.raises(UserError, match="d: exists"), files.replacing(tmp_path / "d", False):
        pass

    def fail():
        with files.replacing(tmp_path / "d", overwrite=True) as new:
            (new / "x").write_text("2")
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert (tmp_path / "d" / "x").read_text() == "1"
    with files.replacing(tmp_path / "d", overwrite=True) as new:
        (new / "y").write_text("3")
    assert [one.name for one in (tmp_path / "d").iterdir()] == ["y"]
    assert [one.name for one in tmp_path.iterdir()] == ["d"]


def test_hashes_and_versions(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert files.sha256_of_json({"b": 1, "a": [2]}) == files.sha256_of_json({"a": (2,), "b": 1})
    found = files.versions(("numpy", "no-such-package"))
    assert found == {"numpy": importlib.metadata.version("numpy")}
