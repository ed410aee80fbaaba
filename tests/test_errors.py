"""Tests of a failing command's message and exit status."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from medsam_jax.errors import UserError
from medsam_jax.io.files import require_space


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        ("UserError('f.csv: no rows; add one')", 1, "error: f.csv: no rows; add one"),
        ("KeyboardInterrupt", 130, "interrupted"),
        (
            "OSError(28, 'No space left on device')",
            1,
            "error: output: the disk is full; free some space and give the same command again",
        ),
    ],
)
def test_one_line_and_a_status(raised, status, line):
    program = f"""
from medsam_jax.cli import run
from medsam_jax.errors import UserError
def main(_):
    raise {raised}
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines() == [line]


def test_ctrl_c_while_the_garbage_collector_is_at_work_is_not_lost():
    program = """
import gc, signal, time
from medsam_jax.cli import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def main(_):
    asked = []
    def callback(phase, info):
        if not asked:
            asked.append(phase)
            signal.raise_signal(signal.SIGINT)
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(20)
    print("went on")
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["interrupted"]


def test_ctrl_c_neither_waits_for_children_nor_takes_the_interpreter_apart():
    program = """
import atexit, multiprocessing, os, time
from medsam_jax.cli import run
def main(_):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print("what was printed", child.pid)
    atexit.register(os.abort)
    raise KeyboardInterrupt
run(main)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 130
    assert done.stdout.startswith("what was printed")
    assert done.stderr.splitlines() == ["interrupted"]


def test_too_little_space_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**29))
    require_space(tmp_path, 2**29, "embeddings")
    with pytest.raises(UserError, match=r"embeddings need 1.00 GiB and 0.50 are free"):
        require_space(tmp_path, 2**30, "embeddings")
