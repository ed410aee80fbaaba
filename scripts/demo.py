"""Runs the whole workflow on real scans with the commands of a user; `make demo` calls it.

    python scripts/demo.py [--folder demo]

Each step is one command. A step is skipped if the same command has completed after the same steps.
An interrupted step is resumed (training from its last checkpoint). At the end the script prints the
report's path and the commands, to be repeated with other data.
"""

import hashlib
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags

from medsam_jax.cli import run
from medsam_jax.errors import UserError
from medsam_jax.io.files import sha256_of

_FOLDER = flags.DEFINE_string("folder", "demo", "Where scans, data set, results and report go.")

SPLITS = ("tune", "validation")

# Structures of the organ maps: one that the released weights segment well and two that they do not.
# More of them would make every evaluation of the tune split longer.
LABELS = {
    "brain_tumour": {1: "tumour"},
    "breast_tumour": {1: "tumour"},
    "lung_tumour": {1: "tumour"},
    "organs_ct": {52: "aorta", 86: "left_back_muscle", 87: "right_back_muscle"},
    "organs_mr": {23: "aorta", 46: "left_back_muscle", 47: "right_back_muscle"},
}


@dataclass(frozen=True)
class Step:
    """One command, and the outputs to delete before it runs from the start."""

    title: str
    command: list[str]
    output: Path
    reads: tuple[Path, ...] = field(default=())  # files whose change makes the step run again


def steps(folder: Path) -> list[Step]:
    python = _relative(Path(sys.executable))
    scans, data, training = folder / "scans", folder / "data", folder / "training"
    best = training / "best"
    labels = ",".join(f"{t}:{i}={name}" for t, ids in LABELS.items() for i, name in ids.items())
    build = ["--manifest", f"{scans}/cases.csv", "--data_dir", str(data), "--recipe", "lite"]
    build += ["--labels", labels]
    config = Path("configs/demo.py")
    train = ["--config", str(config), "--workdir", str(training), f"--config.data_dir={data}"]
    train += [f"--config.embedding_cache={folder}/embeddings"]

    def evaluate(when: str, checkpoint: str) -> list[Step]:
        return [
            Step(
                f"evaluating {checkpoint} on the {split} split",
                [
                    *(python, "-m", "medsam_jax.evaluate", "--checkpoint", checkpoint),
                    *("--data_dir", str(data), "--split", split),
                    *("--output", f"{folder}/{when}/{split}"),
                ],
                folder / when / split,
            )
            for split in SPLITS
        ]

    report = [python, "scripts/demo_report.py", "--folder", str(folder)]
    return [
        Step(
            "fetching scans",
            [python, "scripts/demo_scans.py", "--output", str(scans)],
            scans,
            (Path("scripts/demo_scans.py"), Path("scripts/demo-packages.txt")),
        ),
        Step("building the data set", [python, "-m", "datasets.build", *build], data),
        *evaluate("before", "lite_medsam"),
        Step(
            "fine-tuning the mask decoder",
            [python, "-m", "medsam_jax.train", *train],
            training,
            (config,),
        ),
        *evaluate("after", str(best)),
        Step(
            "writing the report", report, folder / "report.html", (Path("scripts/demo_report.py"),)
        ),
    ]


def main(argv) -> None:
    del argv
    if not Path("scripts/demo.py").exists():
        raise UserError(f"{Path.cwd()}: not the repository's root; change to it and run again")
    folder, start = Path(_FOLDER.value), time.monotonic()
    todo = steps(folder)
    commands = "".join(f"{shlex.join(step.command)}\n" for step in todo)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commands.txt").write_text(commands)
    history = ""
    for number, step in enumerate(todo, 1):
        history = _key(history, step)
        marker = folder / "steps" / f"{number}"
        print(f"[{number}/{len(todo)}] {step.title}", flush=True)
        if marker.exists() and marker.read_text() == f"done {history}":
            print("  already done", flush=True)
            continue
        _execute(step, marker, history)
    print(f"\nThe commands, in order ({time.monotonic() - start:.0f} s in this run):\n\n{commands}")
    print(f"Report: {(folder / 'report.html').resolve()}")


def _execute(step: Step, marker: Path, key: str) -> None:
    """Runs a step; the marker records its start and its completion for the next run."""
    begun = f"begun {key}"
    if not (marker.exists() and marker.read_text() == begun):
        _remove(step.output)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(begun)
    print(f"  {shlex.join(step.command)}", flush=True)
    start = time.monotonic()
    status = subprocess.run(step.command, stdin=subprocess.DEVNULL).returncode
    if status != 0:
        raise UserError(f"{step.title}: the command above ended with status {status}")
    marker.write_text(f"done {key}")
    print(f"  took {time.monotonic() - start:.0f} s", flush=True)


def _key(history: str, step: Step) -> str:
    """Returns a key of the step's command, the files it reads and all steps before it."""
    files = [sha256_of(path) for path in step.reads]
    return hashlib.sha256("\n".join([history, *step.command, *files]).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _relative(path: Path) -> str:
    """Returns the interpreter's path relative to the repository root, as a user would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    run(main)
