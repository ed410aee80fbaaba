"""docs/first_hour.md in an environment without a clone: commands, exit status, stated output."""

import csv
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from tests.datasets.scans import write_volume
from tests.docs.wheel import ROOT, build_wheel, install
from tests.tiny import tiny_sam

PAGE = (ROOT / "docs/first_hour.md").read_text(encoding="utf-8")
STEP = re.compile(r"^```\n(medsam-jax .*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five patients, and a tiny model that commands find before they look for known weights."""
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        patient = tmp_path / f"patients/p{number:02d}"
        patient.mkdir(parents=True)
        organ = np.zeros((4, 48, 48), np.uint8)
        organ[1:, 8 : 24 + number, 10:30] = 1
        scan = rng.normal(0, 5, organ.shape) + 600.0 * organ - 500
        write_volume(patient / "ct.nii.gz", scan.astype(np.int16))
        write_volume(patient / "ct_mask.nii.gz", organ)
    model = tiny_sam()
    state = flatten_state(model)
    save_model(tmp_path / "lite_medsam", state, model.config, {"licence": "Apache-2.0"})
    return tmp_path


def absent(stated: str, printed: str) -> list[str]:
    """Returns the stated lines that are not among those printed, in that order."""
    lines = iter(printed.splitlines())
    patterns = [".*".join(map(re.escape, line.split("..."))) for line in stated.splitlines()]
    return [p for p in patterns if not any(re.fullmatch(p, line) for line in lines)]


def test_a_line_that_is_not_printed_is_found():
    assert absent("a ...\nb\n", "a x\nc\nb\n") == []
    assert absent("a\nb\n", "b\na\n") == ["b"]


def test_from_folders_to_a_table_on_held_out_patients(folder, programs):
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    steps = STEP.findall(PAGE)
    assert len(steps) == PAGE.count("\nmedsam-jax ") == 7, "six commands, and the one refused"
    for command, stated in steps:
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
        )
        printed = done.stdout + done.stderr
        assert done.returncode == stated.startswith("error: "), printed
        assert absent(stated, printed) == [], printed
        assert "Traceback" not in printed
    assert not (folder / "leak").exists()
    with (folder / "results/summary.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "liver"]
    assert [row["checkpoint"] for row in rows] == ["Released", "Tuned"]
    assert {row["cases"] for row in rows} == {"1"}
    table = (folder / "results/summary.md").read_text(encoding="utf-8")
    assert "NSD (2 mm)" in table
