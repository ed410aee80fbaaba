"""`import medsam_jax` is quick because it loads little; benchmarks/startup.py times it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

LAZY = ("SimpleITK", "tensorflow_datasets", "grain", "matplotlib", "scipy", "cv2", "orbax", "torch")
EVERY_PUBLIC_NAME = "import medsam_jax; [getattr(medsam_jax, name) for name in medsam_jax.__all__]"


@pytest.mark.parametrize("code", ["import medsam_jax", EVERY_PUBLIC_NAME])
def test_no_heavy_library_is_loaded(code):
    code += f"; import sys; print([name for name in {LAZY} if name in sys.modules])"
    root = Path(__file__).parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["medsam_jax", "weights_converter"])
def test_type_checkers_are_told_of_the_annotations(package):
    """`py.typed` is there, and is one of the files that a wheel takes."""
    root = Path(__file__).parents[1]
    assert (root / package / "py.typed").is_file()
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["*"]
