"""The serve command: its refusals, and its self-test from start to end."""

import subprocess
import sys

import pytest

from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from tests.tiny import tiny_sam

SERVE = ("-m", "medsam_jax.serve", "--port", "0")
WITHOUT_UVICORN = (
    "-c",
    "import runpy, sys; sys.modules['uvicorn'] = None; "
    "runpy.run_module('medsam_jax.serve', run_name='__main__')",
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SERVE, "--host", "0.0.0.0"), "error: --host: 0.0.0.0 lets other machines connect"),
        ((*SERVE, "--modality", "XX"), "error: --modality: 'XX' is unknown"),
        (WITHOUT_UVICORN, 'error: uvicorn: not installed; pip install "medsam-jax[serve]"'),
        ((*SERVE, "--host", "no.such.invalid", "--token", "a"), "error: --host, --port: no.such"),
    ],
)
def test_refusals_are_one_line(arguments, message):
    command = [sys.executable, *arguments, "--checkpoint", "lite_medsam"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.startswith(message)
    assert answer.stderr.count("\n") == 1


def test_the_selftest_ends_with_its_times(tmp_path):
    model = tiny_sam()
    save_model(tmp_path / "tiny", flatten_state(model), model.config, {"licence": "Apache-2.0"})
    command = [sys.executable, *SERVE, "--checkpoint", str(tmp_path / "tiny"), "--selftest"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "licence shown by the viewers: Apache-2.0 (medsam_jax, tiny)" in answer.stdout
    assert "first box, all slices" in answer.stdout
