"""A run that is killed again and again repeats the undisturbed one, bit for bit."""

import signal

from scripts.kill_test import Disturbed, compare, finish
from tests.training.runs import command


def test_killed_three_times_equals_undisturbed(undisturbed, fields, tmp_path):
    """At a step, while a checkpoint is written, by SIGTERM; `scripts/kill_test.py` does more."""
    workdir = tmp_path / "killed"
    train = command(workdir, fields | {"report": True})
    with (tmp_path / "log").open("w") as log:
        run = Disturbed(train, workdir, log, seed=0)
        run.kill("step", ahead=1, delay=0.1)
        assert "half written" in run.kill("write", ahead=1)
        told = run.kill("step", signal.SIGTERM, ahead=1, delay=0)
        assert told.startswith("SIGTERM"), told
        assert run.status == 143
        assert not (workdir / "last").exists()
        assert not (workdir / "report.html").exists()
        finish(train, log)
    assert (workdir / "report.html").exists()
    assert compare(undisturbed, workdir) > 50
    leftover = [path.name for path in workdir.iterdir() if path.name.startswith(".")]
    assert not leftover
