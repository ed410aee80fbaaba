"""Times this library and its peers side by side.

    python -m benchmarks.run --suite cpu
    python -m benchmarks.run --suite cpu --only "decoder, 64" --rounds 5

`make bench` runs it in an environment with the peers, then writes the tables of
`docs/performance.md`. A row replaces only its own earlier results in the file, so a suite can be
run in parts. A row whose outputs differ is reported and not timed. The exit status is then 1.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from benchmarks import machine, report
from benchmarks.harness import measure
from benchmarks.suites import every_row
from medsam_jax.cli import run
from medsam_jax.errors import UserError

_SUITE = flags.DEFINE_enum("suite", "cpu", ["cpu", "gpu"], "Which rows: those for a CPU or a GPU.")
_ONLY = flags.DEFINE_string("only", None, "Only rows whose name contains this.")
_LIST = flags.DEFINE_bool("list", False, "Print the names of the rows and end.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each contender.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 15.0, "After three rounds, a row takes no longer.")
_POINTS = flags.DEFINE_integer("points", 32, "Points per side of automatic masks.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", None, "CPU cores for each contender; all when not given.")
_OUTPUT = flags.DEFINE_string("output", "docs/performance.json", "Results file; rows are replaced.")


def main(argv) -> None:
    del argv
    rows = [row for row in every_row(_POINTS.value) if row.suite == _SUITE.value]
    chosen = [row for row in rows if _ONLY.value is None or _ONLY.value in row.name]
    if not chosen:
        names = "; ".join(row.name for row in rows)
        raise UserError(f"--only={_ONLY.value}: no such row; those of {_SUITE.value}: {names}")
    if _LIST.value:
        print("\n".join(row.name for row in chosen))
        return
    cores = _CORES.value or len(os.sched_getaffinity(0))
    described = machine.describe(cores)
    if _SUITE.value == "gpu":
        described["gpu"] = _ask("from benchmarks.machine import gpu; print(gpu() or '')")
        if not described["gpu"]:
            raise UserError("--suite=gpu: jax finds no GPU here; these rows wait for one")
    command = shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]])
    print("measuring the machine's limits", flush=True)
    limits = json.loads(_ask("from benchmarks.machine import main; main()"))
    failures = []
    for row in chosen:
        start = time.monotonic()
        print(f"{row.name}: {', '.join(c.name for c in row.contenders)}", flush=True)
        try:
            found = measure(row, rounds=_ROUNDS.value, seconds=_SECONDS.value, cores=cores)
        except UserError as error:
            failures.append(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        entry = report.entry(row, found, described, limits, command)
        report.merge(Path(_OUTPUT.value), [entry], [row.name for row in rows])
        print("\n".join(report.summary(entry)), flush=True)
        print(f"  {time.monotonic() - start:.0f} s for this row", flush=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(chosen)} rows failed: {'; '.join(failures)}")
    print(f"written to {_OUTPUT.value}; python -m benchmarks.report makes the tables")


def _ask(code: str) -> str:
    """Runs Python code in its own process, which frees the device; returns the last line."""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"measuring the machine: {answer.stderr.strip().splitlines()[-1]}")
    return (answer.stdout.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    run(main)
