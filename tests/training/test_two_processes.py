"""Two processes over loopback train as one: same losses, same scores, one set of files."""

import socket
import subprocess

import numpy as np

from medsam_jax.models.checkpoint import read_params
from tests.training.runs import ROOT, command, values


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_train_as_one(fields, undisturbed, tmp_path):
    """The second start of both finds the checkpoints of the first and goes on from there."""
    for num_steps in (4, 8):
        run = command(tmp_path, fields | {"num_steps": num_steps})
        run += ["--num_processes=2"]
        run += [f"--coordinator=127.0.0.1:{free_port()}"]
        processes = [
            subprocess.Popen(
                [*run, f"--process_id={i}"],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
            for i in range(2)
        ]
        try:
            errors = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], errors
    for name in ("train/loss", "tune/dice", "tune/nsd", "tune/objects"):
        expected, found = (values(path, name) for path in (undisturbed, tmp_path))
        assert list(found) == list(expected)
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    assert read_params(tmp_path / "last").keys() == read_params(undisturbed / "last").keys()
