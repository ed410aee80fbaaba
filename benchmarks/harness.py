"""Defines the rows of the comparison and measures one row.

Each contender of a row runs in its own process. It thus has its own thread pools, allocator and
peak memory, and it sleeps while another is timed. The parent lets each contender do the work once
and compares the outputs. Timing follows in rounds: one call of every contender per round, in
rotated order, so that load on the machine affects all contenders.
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

SETTLE_SECONDS = 0.05  # between two calls, until the thread pools of the last one stop spinning
_LEAST_ROUNDS = 3  # at least, also when a row's time is used up
# Shorter calls get a second call before the timed ones, as the first may leave lazy work behind. In
# longer calls that work is negligible. Seconds.
_LONG_CALL = 5.0


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    name: str
    setup: str  # "module:function"; called with `arguments`, it returns a `Work`
    arguments: Mapping = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)  # for example allocator settings


@dataclass(frozen=True)
class Row:
    """Line of the table: the same work by several contenders, ours first.

    With `compared` False the contenders are variants of ours whose outputs cannot be compared, for
    example batch sizes. Ratios are then those of the time per item.
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
    """Result of a contender's setup: the call to time and its size."""

    run: Callable[[int], object]  # index of one of several inputs -> array or tuple of arrays
    operations: float | None = None  # in matrix products of one call; None if not counted
    bytes: float | None = None  # least that one call reads and writes; None if not counted
    items: int = 1  # images, slices or prompts of one call
    peak_memory: Callable[[], int] | None = None  # of an accelerator; default: of the process


@dataclass
class Measurement:
    """Measurement of one contender of one row; times in seconds, memory in bytes."""

    name: str
    seconds: list[float]
    first_call: float  # includes compilation
    peak_memory: int  # of the whole process, including interpreter and libraries
    difference: float | None  # of outputs from ours, as a fraction of the largest value
    operations: float | None
    bytes: float | None
    items: int
    environment: dict[str, str]
    versions: dict[str, str]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


class _Worker:
    """Process of a contender; takes a JSON request per line, returns a JSON answer per line."""

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
        """Returns the answer to a request. Raises UserError with the log's end if it died."""
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
      rounds: largest number of calls per contender; the row's own number applies if smaller.
      seconds: time limit; after three rounds, no round begins once it is used up.
      cores: CPU cores per contender.

    Raises:
        UserError: a contender's process died, or its outputs differ from ours by more than the
            row's tolerance. The row is then not timed.
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
    """Sets up every contender, runs it once and compares the outputs."""
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
    """Returns the largest |ours - theirs| / largest |theirs| over all pairs of arrays.

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
