"""Starting runs by the command line, and reading what they wrote."""

import csv
import json
import os
import subprocess
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
    recipe = str(Path(__file__).with_name("recipe.py"))
    main = [sys.executable, "-m", "medsam_jax.train", "--config", recipe]
    return [*main, "--workdir", str(workdir), *flags]


def train(workdir: Path, fields: dict, devices: int = 1) -> str:
    """Runs the command on that many forced devices; returns what it said."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        command(workdir, fields),
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_LOG_COMPILES": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    started = json.loads((workdir / "run.json").read_text())[-1]
    assert started["devices"]["count"] == devices
    return run.stderr
