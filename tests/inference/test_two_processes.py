"""Two processes, joined as by SLURM, share a folder: each image once, one list for COCO."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state

ROOT = Path(__file__).parents[2]


def start(process: int, arguments: list[str]) -> subprocess.Popen:
    slurm = {"JOB_ID": str(os.getpid()), "STEP_NODELIST": "localhost", "NTASKS": "2"}
    slurm |= {"PROCID": str(process), "LOCALID": str(process)}
    env = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    command = [sys.executable, "-m", "medsam_jax.predict", "--multihost", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def test_two_processes_share_a_folder(model, tmp_path):
    """One of the four images is damaged: both name it by their status, one by its message."""
    save_model(tmp_path / "tiny", flatten_state(model), model.config, {})
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number, name in enumerate("abcd"):
        array = np.full((20, 30), 20 * number, np.uint8)
        array[5:15, 5:20] = 255
        Image.fromarray(array).save(images / f"{name}.png")
    (images / "d.png").write_bytes(b"")
    arguments = [f"--checkpoint={tmp_path / 'tiny'}", f"--image={images}", f"--output={output}"]
    processes = [start(number, [*arguments, "--box=5,5,20,15"]) for number in range(2)]
    try:
        told = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], told
    (out, error), (other_out, other_error) = told
    assert "3 images done, 0 skipped (finished earlier), 1 failed" in out
    assert "images done" not in other_out
    assert "d.png: is empty" in other_error, "images go round the processes: b and d are its share"
    assert "d.png" not in error
    assert all("error: 1 of 4 images failed; they are named above" in said for _, said in told)
    coco = json.loads((output / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a.png", "b.png", "c.png"]
    assert not list(output.glob(".*")), "nothing half-written"
