"""A pod of eight processes over loopback: two are killed in mid-run, and the run ends the same."""

import os
import re
import signal
import subprocess
import sys
import time

from scripts.kill_test import compare, last_step
from tests.training.runs import ROOT

PROCESSES = 8


def pod(workdir, fields) -> list[str]:
    command = [sys.executable, "-m", "launch.local", f"--processes={PROCESSES}"]
    command += ["--config=tests/training/recipe.py", f"--workdir={workdir}"]
    command += [f"--python={sys.executable}", f"--data_dir={fields['data_dir']}"]
    more = {"batch_size": 8, "embedding_cache": workdir.parent / f"{workdir.name}_cache"}
    changed = {name: x for name, x in (fields | more).items() if name != "data_dir"}
    return command + [f"--set={name}={value}" for name, value in changed.items()]


def test_two_of_eight_are_killed_and_the_run_ends_the_same(fields, tmp_path):
    fields = fields | {"num_steps": 30, "eval_every": 15}
    once = subprocess.run(
        pod(tmp_path / "once", fields), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert once.returncode == 0, once.stderr

    workdir, log = tmp_path / "killed", tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(pod(workdir, fields), cwd=ROOT, stderr=file)
        try:
            deadline = time.monotonic() + 1800
            while last_step(workdir) < 5 and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            pids = dict(re.findall(r"^process (\d): pid (\d+)$", log.read_text(), re.MULTILINE))
            for number in ("2", "5"):
                os.kill(int(pids[number]), signal.SIGKILL)
            assert run.wait(timeout=1800) == 0, log.read_text()
        finally:
            run.terminate()
    said = log.read_text()
    assert "processes were lost; restart 1 of 100" in said
    assert "restart 2" not in said
    assert len(re.findall(r"^error: process [25] of 8 is lost; ", said, re.MULTILINE)) == 6
    assert re.search(r"resumed at step [1-9]", said)
    assert compare(tmp_path / "once", workdir) > 100
    assert not list(workdir.glob(".*")), "nothing half-written is left"
