"""Kills a training run at random moments; results must be bit-identical to an undisturbed run's.

Example, on the outputs of `make demo`:
  python scripts/kill_test.py --config=configs/demo.py --workdir=runs/kills --kills=10 \\
      --set=data_dir=demo/data --set=embedding_cache=demo/embeddings --set=num_steps=60 \\
      --set=eval_every=20 --set=checkpoint_every=2 --set=log_every=1

One third of the kills (SIGKILL) occur while a checkpoint is written, one third at a random time
after a random step, and one third at a random time after the start (imports, compilation,
restoring). The script then compares all losses, norms and tune scores and all exported arrays.
"""

import contextlib
import csv
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from medsam_jax import cli, errors
from medsam_jax.models.checkpoint import read_params

MOMENTS = ("step", "write", "start")

_CONFIG = flags.DEFINE_string("config", None, "Recipe.")
_WORKDIR = flags.DEFINE_string("workdir", None, "For both runs; must not exist.")
_SET = flags.DEFINE_multi_string("set", [], "NAME=VALUE of a config field, of both runs.")
_KILLS = flags.DEFINE_integer("kills", 10, "How many.", lower_bound=1)
_AHEAD = flags.DEFINE_integer("ahead", 6, "A kill comes 1 to this many steps on.", lower_bound=1)
_START = flags.DEFINE_float("start_seconds", 20.0, "Until when a start may be killed.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")


def main(_) -> None:
    workdir = Path(_WORKDIR.value)
    if workdir.exists():
        raise errors.UserError(f"--workdir: {workdir} exists; name a new one")
    workdir.mkdir(parents=True)
    train = [sys.executable, "-m", "medsam_jax.train", "--config", _CONFIG.value]
    train += [f"--config.{field}" for field in ("report=False", *_SET.value)]
    undisturbed, killed = workdir / "undisturbed", workdir / "killed"
    with (workdir / "log").open("w") as log:
        print("undisturbed run", flush=True)
        finish([*train, "--workdir", str(undisturbed)], log)
        run = Disturbed([*train, "--workdir", str(killed)], killed, log, _SEED.value)
        for number in range(_KILLS.value):
            moment = MOMENTS[number % len(MOMENTS)]
            print(run.kill(moment, ahead=_AHEAD.value, start_seconds=_START.value), flush=True)
        print("run to the end", flush=True)
        finish(run.command, log)
    count = compare(undisturbed, killed)
    print(f"{count} numbers and all arrays of last/ are the same to the bit")


def finish(command: Sequence[str], log) -> None:
    """Runs a command to its end. Raises UserError if it fails."""
    if subprocess.run(command, stdout=log, stderr=log).returncode:
        raise errors.UserError(f"{log.name}: the run failed; see its end")


@dataclasses.dataclass
class Disturbed:
    """Training run that is killed and restarted."""

    command: Sequence[str]
    workdir: Path
    log: object  # open file
    seed: int

    def __post_init__(self):
        self._rng = np.random.default_rng(self.seed)
        self.status: int | None = None  # of the last process

    def kill(
        self,
        moment: str,
        number: int = signal.SIGKILL,
        *,
        ahead: int = 3,
        delay: float = 1.0,
        start_seconds: float = 10.0,
    ) -> str:
        """Starts the run and sends it a signal; returns a text that says when.

        Args:
          moment: "start": up to `start_seconds` after the start; "step": up to `delay` seconds
            after one of the next `ahead` steps is logged; "write": after such a step, when a
            checkpoint is half written.
          number: signal number.

        Raises:
          UserError: the run ended before the signal.
        """
        target = max(last_step(self.workdir), 0) + int(self._rng.integers(1, ahead + 1))
        started = time.time()
        process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)
        try:
            if moment == "start":
                time.sleep(self._rng.uniform(0, start_seconds))
            else:
                self._wait(process, lambda: last_step(self.workdir) >= target)
            if moment == "write":
                self._wait(process, lambda: half_written(self.workdir, started))
            elif moment == "step":
                time.sleep(self._rng.uniform(0, delay))
            if process.poll() is not None:
                raise errors.UserError(f"{self.workdir}: ended before it was killed; more steps")
        finally:
            process.send_signal(number)
            self.status = process.wait()
        told = f"{signal.Signals(number).name} after step {last_step(self.workdir)}"
        return told + ", a checkpoint half written" * bool(half_written(self.workdir, started))

    def _wait(self, process: subprocess.Popen, condition) -> None:
        while not condition() and process.poll() is None:
            time.sleep(0.001)


def last_step(workdir: Path) -> int:
    """Returns the last step whose loss is logged; -1 if there is none."""
    rows = read_metrics(workdir)
    return max((step for step, name in rows if name == "train/loss"), default=-1)


def half_written(workdir: Path, since: float) -> list[Path]:
    """Returns checkpoints begun after `since` that still have their temporary name."""
    found = []
    for path in (workdir / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # renamed in the meantime
            if path.stat().st_mtime > since:
                found.append(path)
    return found


def read_metrics(workdir: Path) -> dict[tuple[int, str], str]:
    """Maps (step, name) to the value's text. Raises UserError for a step written twice."""
    path = workdir / "metrics.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
    values = {(int(step), name): value for step, name, value in rows}
    if len(values) < len(rows):
        raise errors.UserError(f"{path}: {len(rows) - len(values)} numbers are there twice")
    return values


def compare(undisturbed: Path, disturbed: Path) -> int:
    """Compares the numbers and arrays of two runs, except speeds; returns the count of numbers.

    Raises:
      UserError: a number or an array differs; the message has the first one.
    """
    expected, found = (
        {key: value for key, value in read_metrics(run).items() if not key[1].startswith("speed/")}
        for run in (undisturbed, disturbed)
    )
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise errors.UserError(
                f"{disturbed}: step {key[0]}, {key[1]}: {found.get(key)}, undisturbed "
                f"{expected.get(key)}"
            )
    arrays, expected_arrays = read_params(disturbed / "last"), read_params(undisturbed / "last")
    for name, value in expected_arrays.items():
        if arrays[name].tobytes() != value.tobytes():
            raise errors.UserError(f"{disturbed}/last: {name} differs")
    return len(expected)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
