"""Starting runs by the command line, and reading what they wrote."""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def values(workdir: Path, name: str) -> dict[int, float]:
    with (workdir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == name]
    steps = [int(row["step"]) for row in rows]
    assert len(steps) == len(set(steps)), f"{name} is written twice for a step"
    return {int(row["step"]): float(row["value"]) for row in rows}


def command(workdir: Path, fields: dict) -> list[str]:
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    recipe = str(ROOT / "configs" / "demo.py")
    main = [sys.executable, "-m", "medsam_jax.train", "--config", recipe]
    return [*main, "--workdir", str(workdir), *flags]
