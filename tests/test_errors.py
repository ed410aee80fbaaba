"""What a command line says when it fails, and its exit status."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        ("UserError('f.csv: no rows; add one')", 1, "error: f.csv: no rows; add one"),
        ("KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_one_line_and_a_status(raised, status, line):
    program = f"""
from medsam_jax.errors import UserError, run
def main(_):
    raise {raised}
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines() == [line]
