"""The demo's page, from what the other steps of the demo leave: here of tiny models."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medsam_jax.evaluation import run
from medsam_jax.io.files import write_json
from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.training.config import base_config
from tests.tiny import tiny_sam

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(built, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "demo"
    shutil.copytree(built, folder / "data")
    best = folder / "training" / "best"
    for seed, place in enumerate((tmp_path / "lite_medsam", best)):
        model = tiny_sam(seed)
        save_model(place, flatten_state(model), model.config, {})
    config = json.loads(base_config().to_json_best_effort())
    write_json(folder / "training" / "run.json", [{"config": config, "best": {"step": 2}}])
    rows = [(1, "train/loss", 2.0), (2, "train/loss", 1.5), (0, "tune/dice", 0.25)]
    with (folder / "training" / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "name", "value"), *rows])
    (folder / "commands.txt").write_text("python <one>\n")
    return folder


def report(folder: Path) -> subprocess.CompletedProcess:
    script = str(ROOT / "scripts" / "demo_report.py")
    return subprocess.run(
        [sys.executable, script, "--folder", "demo"],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )


def test_the_page_shows_what_evaluate_found_and_scores_nothing(demo):
    missing = report(demo)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: demo/before/tune: not evaluated; run scripts/demo.py")
    means = {}
    for when, checkpoint in (("before", "lite_medsam"), ("after", "demo/training/best")):
        for split in ("tune", "validation"):
            output = demo / when / split
            run.evaluate([checkpoint], output, data_dir="demo/data", split=split)
            with (output / "per_object.csv").open(newline="") as file:
                dice = [float(row["dice"]) for row in csv.DictReader(file)]
            means[split, when] = float(np.mean(dice))
    kept = {path: path.read_bytes() for path in demo.rglob("*.jsonl")}
    assert len(kept) == 4
    done = report(demo)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in demo.rglob("*.jsonl")} == kept
    page = (demo / "report.html").read_text()
    lines = re.findall("<tr><td>(tune|validation)</td><td>(.*?)</td>.*?</tr>", page)
    assert {split for split, _ in lines} == {"tune", "validation"}
    shown = re.search(r"tune split, encoders frozen: ([\d.]+) before, ([\d.]+) after", page)
    expected = [means["tune", when] for when in ("before", "after")]
    np.testing.assert_allclose([float(x) for x in shown.groups()], expected, atol=5.1e-5)
    assert "python &lt;one&gt;" in page
