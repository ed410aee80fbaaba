"""The Containerfile's steps, in a clean virtual environment: no container engine is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def steps() -> list[tuple[str, str]]:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def copy(sources: list[str], target: Path) -> None:
    """Copies what the repository holds, as an engine does without the ignored files."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *sources]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for file in files.splitlines():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, target / file)


def test_the_steps_are_those_that_are_run_here():
    names = [name for name, _ in steps()]
    assert names[:3] == ["FROM", "ARG", "WORKDIR"]
    assert set(names[3:]) == {"COPY", "RUN", "ENV"}
    assert dict(steps())["FROM"].startswith("docker.io/library/python:3.")


def test_the_steps_run(tmp_path):
    """For a TPU: CUDA's libraries are gigabytes, and the steps are the same."""
    environment, work = tmp_path / "environment", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    work.mkdir()
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    variables = {name: x for name, x in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"PATH": path, "JAX": "tpu", "JAX_PLATFORMS": "cpu"}
    for name, what in steps()[3:]:
        if name == "COPY":
            *sources, target = what.split()
            assert target in (".", "./")
            copy(sources, work)
        elif name == "RUN":
            run = subprocess.run(
                ["sh", "-ec", what], cwd=work, env=variables, capture_output=True, text=True
            )
            assert run.returncode == 0, f"{what}\n{run.stdout}{run.stderr}"
