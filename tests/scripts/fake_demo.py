"""The demo's driver with two invented steps; `test_demo.py` runs it as a user runs the demo."""

import sys
from pathlib import Path

from medsam_jax.cli import run
from scripts import demo


def append(text: str, path: Path) -> list[str]:
    """A command that adds a line to a file, and fails while a file named `broken` is beside it."""
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); "
        "p.open('a').write(sys.argv[2]); sys.exit((p.parent.parent / 'broken').exists())"
    )
    return [sys.executable, "-c", code, str(path), text]


def steps(folder: Path) -> list[demo.Step]:
    first, second = folder / "first", folder / "second"
    return [
        demo.Step("one", append("1", first / "log"), first, (folder / "input",)),
        demo.Step("two", append("2", second / "log"), second),
    ]


if __name__ == "__main__":
    demo.steps = steps
    run(demo.main)
