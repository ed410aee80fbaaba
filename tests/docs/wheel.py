"""Builds the wheel, and installs it in an environment without a clone."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("medsam_jax", "datasets", "configs", "weights_converter")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """Returns the wheel that is made from the source distribution, as an index would offer them.

    Both are made of a copy of the sources: setuptools leaves files of its own beside them.
    """
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "sources")
    code = "from setuptools import build_meta; build_meta.build_sdist('..')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "sources", capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    _pip("wheel", *options, archive)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Returns the folder of programs of a new environment that has the wheel.

    Its other packages are those of the environment of the tests, without its editable installs.
    """
    venv.create(folder)
    python = folder / "bin/python"
    _pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "others.pth").write_text("\n".join(others), encoding="utf-8")
    return python.parent


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
