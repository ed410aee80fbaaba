"""The folder `configs/` of a clone under this name, which setup.py gives it in a wheel."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
