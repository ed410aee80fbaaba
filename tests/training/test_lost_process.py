"""Where one of several processes is lost or fails, the others end at once, with one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_two_processes import free_port

ROOT = Path(__file__).parents[2]

# Three processes wait for one another again and again; process 1 fails where it is told to.
PROGRAM = """
import sys
from absl import logging
from medsam_jax import cli, distributed
from medsam_jax.errors import UserError

def main(argv):
    logging.set_verbosity(logging.WARNING)
    process, port, fails = argv[1:]
    distributed.join_processes(False, f"127.0.0.1:{port}", 3, int(process))
    distributed.wait_for_all("first")
    print("joined", flush=True)
    if (process, fails) == ("1", "fails"):
        raise UserError("lesion.nii: is damaged")
    while True:
        distributed.wait_for_all("next")

cli.run(main, positional=3)
"""


def start(process: int, port: int, fails: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(process), str(port), fails]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.mark.parametrize("kind", ["lost 0", "lost 1", "fails 1"])
def test_the_others_end_with_one_line(kind):
    what, number = kind.split()
    port = free_port()
    processes = [start(i, port, what) for i in range(3)]
    one = processes.pop(int(number))
    try:
        for process in (one, *processes):  # Gloo says something before
            assert "joined\n" in process.stdout
        if what == "lost":
            one.kill()
        told = [process.communicate(timeout=60)[1] for process in processes]
        error = one.communicate(timeout=60)[1]
    finally:
        for process in (one, *processes):
            process.kill()
    ended = {process.returncode for process in processes}
    if what == "lost":
        assert one.returncode == -signal.SIGKILL
        line = f"error: process {number} of 3 is lost; the same command goes on from what is saved"
        assert ended == {143}
        if number == "0":  # before the last line jax may say that its service has gone
            told = [f"{error.splitlines()[-1]}\n" for error in told]
        assert set(told) == {f"{line}\n"}
    else:
        assert (one.returncode, error) == (1, "error: lesion.nii: is damaged\n")
        line = "error: process 1 of 3 has failed, see its messages"
        assert (ended, set(told)) == ({1}, {f"{line}\n"})
