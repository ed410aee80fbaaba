"""What a command line says when it fails, and its exit status."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from medsam_jax.errors import UserError, require_space


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
from medsam_jax.errors import UserError, run
def main(_):
    raise {raised}
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines() == [line]


def test_too_little_space_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**29))
    require_space(tmp_path, 2**29, "embeddings")
    with pytest.raises(UserError, match=r"embeddings need 1.00 GiB and 0.50 are free"):
        require_space(tmp_path, 2**30, "embeddings")
