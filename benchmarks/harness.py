"""Rows of the comparison, and the measurement of a row.

Each contender of a row runs in a process of its own, with its own thread pools, allocator and peak
memory, and sleeps while others run. First every contender does the row's work once, and the outputs
are compared. Then the calls are timed in rounds. Every contender makes one call per round, in
rotated order, so that other load on the machine affects all contenders.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medsam_jax.errors import UserError

SETTLE_SECONDS = 0.05  # between two calls, so that thread pools stop spinning
_LEAST_ROUNDS = 3  # before the time limit of a row applies
# A second untimed call follows if the first took less than this many seconds: it may have left lazy
# work, which is negligible for longer calls.
_LONG_CALL = 5.0


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    name: str
    setup: str  # "module:function"; called with `arguments`, it returns a `Work`
    arguments: Mapping = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)  # such as allocator settings


@dataclass(frozen=True)
class Row:
    """One row of the table: the same work by several contenders, ours first.

    If `compared` is False, the contenders are variants of ours whose outputs cannot be compared,
    such as batch sizes. Ratios are then those of the time per item.
    """

    name: str
    suite: str  # "cpu" or "gpu"
    contenders: tuple[Contender, ...]
    targets: Mapping[str, float] = field(
        default_factory=dict
    )  # contender -> ours / theirs, at most
    memory_targets: Mapping[str, float] = field(default_factory=dict)  # the same for peak memory
    tolerance: float = 1e-4  # largest difference of outputs, as a fraction of the largest value
    compared: bool = True
    rounds: int = 15  # at most
    precision: str = "float32"  # type whose matrix peak is the limit


@dataclass
class Work:
    """Result of a contender's setup: the function to time and its least work."""

    run: Callable[[int], object]  # index of one of several inputs -> array or tuple of arrays
    operations: float | None = None  # in matrix products of one call, if counted
    bytes: float | None = None  # read and written at least by one call, if counted
    items: int = 1  # images, slices or prompts of one call
    peak_memory: Callable[[], int] | None = (
        None  # of an accelerator; by default that of the process
    )


@dataclass
class Measurement:
    """Result of one contender in one row; times in seconds, memory in bytes."""

    name: str
    seconds: list[float]
    first_call: float  # the first call, compilation included
    peak_memory: int  # of the whole process, interpreter and libraries included
    difference: float | None  # between its outputs and ours, as a fraction of the largest value
    operations: float | None
    bytes: float | None
    items: int
    environment: dict[str, str]
    versions: dict[str, str]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


class _Worker:
    """Process of a contender; requests and answers are JSON, one per line."""

    def __init__(self, contender: Contender, cores: int, folder: Path):
        self.contender = contender
        self.log = folder / f"{contender.name.replace(' ', '_')}.log"
        environment = os.environ | {"OMP_NUM_THREADS": str(cores)} | dict(contender.environment)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(cores)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                cwd=Path(__file__).parents[1],
            )

    def ask(self, **request) -> dict:
        """Sends a request, returns the answer; UserError with the log's end if the process died."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            last = self.log.read_text().strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"{self.contender.name}: its process ended: {last[0]}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(row: Row, *, rounds: int, seconds: float, cores: int) -> list[Measurement]:
    """Measures every contender of a row.

    Args:
      rounds: largest number of calls of each contender; a smaller number of the row applies.
      seconds: time limit of the row; no round starts after it, except the first three.
      cores: CPU cores of each contender.

    Raises:
        UserError: a contender's process died, or its outputs differ from ours by more than the
            row's tolerance. The row is not timed then.
    """
    rounds = min(rounds, row.rounds)
    with tempfile.TemporaryDirectory() as folder:
        workers = [_Worker(contender, cores, Path(folder)) for contender in row.contenders]
        try:
            results = _prepare(row, workers, Path(folder))
            for worker, result in zip(workers, results, strict=True):
                if result.first_call < _LONG_CALL:
                    worker.ask(do="run", index=0)
            start = time.monotonic()
            for r in range(rounds):
                if r >= _LEAST_ROUNDS and time.monotonic() - start > seconds:
                    break
                for worker, result in itertools.islice(
                    itertools.cycle(zip(workers, results, strict=True)),
                    r % len(workers),
                    r % len(workers) + len(workers),
                ):
                    time.sleep(SETTLE_SECONDS)
                    result.seconds.append(worker.ask(do="run", index=r)["seconds"])
            for worker, result in zip(workers, results, strict=True):
                result.peak_memory = worker.ask(do="memory")["peak_memory"]
        finally:
            for worker in workers:
                worker.close()
    return results


def _prepare(row: Row, workers: list[_Worker], folder: Path) -> list[Measurement]:
    """Sets every contender up, runs it once and compares its outputs."""
    results, ours = [], None
    for number, (contender, worker) in enumerate(zip(row.contenders, workers, strict=True)):
        output = str(folder / f"{number}.npz")
        ready = worker.ask(
            do="setup", setup=contender.setup, arguments=dict(contender.arguments), output=output
        )
        difference = None
        if row.compared:
            with np.load(output) as archive:
                outputs = [archive[key] for key in sorted(archive.files)]
            ours = ours or outputs
            difference = _checked_difference(row, contender, ours, outputs)
        results.append(
            Measurement(
                name=contender.name,
                seconds=[],
                first_call=ready["first_call"],
                peak_memory=0,
                difference=difference,
                operations=ready["operations"],
                bytes=ready["bytes"],
                items=ready["items"],
                environment=dict(contender.environment),
                versions=ready["versions"],
            )
        )
    return results


def _checked_difference(row: Row, contender: Contender, ours, theirs) -> float:
    difference = largest_difference(ours, theirs)
    if not difference <= row.tolerance:
        raise UserError(
            f"{row.name}: outputs of {contender.name} differ from ours by {difference:.1e} of "
            f"the largest value, more than {row.tolerance:.0e}; not timed"
        )
    return difference


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Returns the largest |ours - theirs| over the largest |theirs|, of the worst pair of arrays.

    Raises:
        UserError: the numbers of arrays or their shapes differ.
    """
    shapes = [[a.shape for a in arrays] for arrays in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise UserError(f"output shapes differ: ours {shapes[0]}, theirs {shapes[1]}")
    return max(
        float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-30))
        for a, b in zip(ours, theirs, strict=True)
    )
