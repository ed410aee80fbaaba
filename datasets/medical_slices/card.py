"""The data card: README.md and figures beside a built data set."""

import pathlib
from typing import Any


def write(directory: pathlib.Path, record: dict[str, Any]) -> None:
    """Placeholder."""
