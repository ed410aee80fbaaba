"""`import medsam_jax` is quick because it loads little; benchmarks/startup.py times it."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from medsam_jax.cli import config_file

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


@pytest.mark.parametrize("name", ["datasets.build", "datasets.medical_slices.slices"])
def test_a_clone_has_the_names_of_a_wheel(name):
    root = Path(__file__).parents[1]
    found = importlib.util.find_spec(f"medsam_jax.{name}").origin
    assert found == str(root.joinpath(*name.split(".")).with_suffix(".py"))


def test_a_config_is_found_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    assert config_file("lite_medsam") == str(root / "configs/lite_medsam.py")
    for other in ("nowhere", "configs/lite_medsam.py", "lite_medsam.py", ""):
        assert config_file(other) == other
    (tmp_path / "lite_medsam").touch()
    assert config_file("lite_medsam") == "lite_medsam"
