"""Two processes, joined as by SLURM, score what one does: the same tables, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medsam_jax.evaluation.run import evaluate
from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from tests.tiny import tiny_sam

ROOT = Path(__file__).parents[2]
SPLIT = {"split": "tune", "box_shifts": [0, 6], "batch_size": 2}

# The command for the data set, then the function for the scans: one start instead of two.
BOTH_ROUTES = """
import sys
from pathlib import Path
from absl import flags
from medsam_jax import evaluate as command
from medsam_jax.evaluation.run import evaluate

checkpoint, data_dir, manifest, output = sys.argv[1:]
flags.FLAGS(["evaluate", f"--checkpoint={checkpoint}", f"--data_dir={data_dir}", "--split=tune",
             "--box_shift=0,6", "--batch_size=2", f"--output={output}/split", "--multihost"])
command.main([])
evaluate([checkpoint], Path(output) / "scans", manifest=manifest, batch_size=2)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("weights") / "tiny"
    model = tiny_sam()
    save_model(directory, flatten_state(model), model.config, {})
    return str(directory)


def start(process: int, arguments: list[str]) -> subprocess.Popen:
    slurm = {"JOB_ID": str(os.getpid()), "STEP_NODELIST": "localhost", "NTASKS": "2"}
    slurm |= {"PROCID": str(process), "LOCALID": str(process)}
    env = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    command = [sys.executable, "-c", BOTH_ROUTES, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


def rows(folder: Path) -> list[list[str]]:
    """The journal's lines, of each process."""
    parts = sorted(folder.glob("parts/*.jsonl"))
    return [part.read_text().splitlines() for part in parts]


@pytest.fixture(scope="module")
def pictures(hospital) -> str:
    """The manifest's two pictures."""
    head, *lines = hospital.read_text().splitlines()
    manifest = hospital.with_name("pictures.csv")
    manifest.write_text("\n".join([head, *(line for line in lines if line.startswith("u"))]))
    return str(manifest)


def test_two_processes_score_as_one(checkpoint, built, pictures, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate([checkpoint], one / "split", data_dir=str(built), **SPLIT)
    evaluate([checkpoint], one / "scans", manifest=pictures, batch_size=2)

    # What an earlier, killed run of one process has left is not scored again.
    (journal,) = (one / "split" / "parts").iterdir()
    earlier = journal.read_text().splitlines(keepends=True)
    earlier = [line for line in earlier if json.loads(line)["key"] < 2]
    (two / "split" / "parts").mkdir(parents=True)
    (two / "split" / "parts" / journal.name).write_text("".join(earlier))

    arguments = [checkpoint, str(built), pictures, str(two)]
    processes = [start(number, arguments) for number in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said

    for route in ("split", "scans"):
        for name in ("per_object.csv", "summary.csv"):
            expected, found = (folder / route / name for folder in (one, two))
            assert found.read_bytes() == expected.read_bytes(), name
        ((alone,), shares) = rows(one / route), rows(two / route)
        assert len(shares) == 2
        assert sum(len(share) for share in shares) == len(alone), "each object once"
        assert all(shares)
