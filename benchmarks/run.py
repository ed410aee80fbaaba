"""Times this library beside its peers.

    python -m benchmarks.run --suite cpu
    python -m benchmarks.run --suite cpu --only encoder --rounds 5

`make bench` runs it in an environment that holds the peers. A row whose outputs differ is
reported and not timed; the exit status is then 1.
"""

import os
import shlex
import sys
from pathlib import Path

from absl import flags

from benchmarks import data, lite_medsam, machine, metrics, report
from benchmarks.harness import measure
from medsam_jax.errors import UserError, run

_SUITE = flags.DEFINE_enum("suite", "cpu", ["cpu", "gpu"], "Which rows: those for a CPU or a GPU.")
_ONLY = flags.DEFINE_string("only", None, "Only rows whose name contains this.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each contender.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", None, "CPU cores for each contender; all when not given.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Folder for results.json and .md.")


def main(argv) -> None:
    del argv
    every = (*lite_medsam.ROWS, *metrics.ROWS, *data.ROWS)
    rows = [row for row in every if row.suite == _SUITE.value]
    if not rows:
        raise UserError(f"--suite={_SUITE.value}: has no rows yet; use --suite=cpu")
    chosen = [row for row in rows if _ONLY.value is None or _ONLY.value in row.name]
    if not chosen:
        names = ", ".join(row.name for row in rows)
        raise UserError(f"--only={_ONLY.value}: no such row; those of {_SUITE.value}: {names}")
    cores = _CORES.value or len(os.sched_getaffinity(0))
    described, limits = machine.describe(cores), machine.limits()
    command = shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]])
    results, failures = [], []
    for row in chosen:
        print(f"{row.name}: {', '.join(c.name for c in row.contenders)}", flush=True)
        try:
            results.append((row, measure(row, rounds=_ROUNDS.value, cores=cores)))
        except UserError as error:
            failures.append(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        for result in results[-1][1]:
            print(f"  {result.name}: {result.median:.4f} s", flush=True)
        report.write(Path(_OUTPUT.value), results, described, limits, command)
    if results:
        print(report.markdown(results, described, limits, command))
        print(f"written to {_OUTPUT.value}/results.md and results.json")
    if failures:
        raise UserError(f"{len(failures)} of {len(chosen)} rows failed: {'; '.join(failures)}")


if __name__ == "__main__":
    run(main)
