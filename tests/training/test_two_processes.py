"""Two processes over loopback train as one: same losses, same scores, one set of files.

Each has two devices. They share the embedding pass, the steps and the evaluation.
"""

import json
import os
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
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    cached = {"embedding_cache": tmp_path / "cache", "embedding_dtype": "float32"}
    for num_steps in (4, 8):
        run = command(
            tmp_path, fields | cached | {"num_steps": num_steps, "report": num_steps == 8}
        )
        run += ["--num_processes=2"]
        run += [f"--coordinator=127.0.0.1:{free_port()}"]
        processes = [
            subprocess.Popen(
                [*run, f"--process_id={i}"],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": devices},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
            for i in range(2)
        ]
        try:
            printed, errors = zip(*(one.communicate(timeout=300) for one in processes), strict=True)
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], errors
    report = str(tmp_path / "report.html")
    assert printed[0].splitlines()[-1] == report
    assert report not in printed[1]
    assert len(list((tmp_path / "report" / "parts").glob("*-1.jsonl"))) == 2, "a share each"
    started = json.loads((tmp_path / "run.json").read_text())[-1]["devices"]
    assert (started["count"], started["processes"]) == (4, 2)
    for name in ("train/loss", "tune/dice", "tune/nsd", "tune/objects"):
        expected, found = (values(path, name) for path in (undisturbed, tmp_path))
        assert list(found) == list(expected)
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    assert read_params(tmp_path / "last").keys() == read_params(undisturbed / "last").keys()
