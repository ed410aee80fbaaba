"""Watching a run: step times and their shares, traces, finite losses, metrics on disk, SIGTERM."""

import contextlib
import csv
import io
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from medsam_jax.errors import UserError
from medsam_jax.io.files import write_whole

log = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s of one jax device, by the start of its `device_kind`, from data sheets.
# On TPU v2 and v3 a device is one core, half a chip.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}


class StepClock:
    """Measures images per second, time waiting and computing, and model FLOP utilisation (MFU)."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._utilisation = 0.0  # MFU if a step took one second
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._waited = 0, 0.0

    def measure(self, step: jax.stages.Compiled, accumulation_steps: int) -> None:
        """Reads one device's FLOP of a step from XLA; without a known peak there is no MFU.

        XLA counts recomputation (`remat`) too, and the body of the accumulation loop once.
        """
        flops = (step.cost_analysis() or {}).get("flops", 0.0) * accumulation_steps
        peak = peak_flops(jax.devices()[0].device_kind)
        self._utilisation = flops / peak if peak else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out: compilation, evaluation."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data, once a step."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def scalars(self) -> dict[str, float]:
        """Returns means since the last call, and the peak memory of the fullest device."""
        seconds = time.perf_counter() - self._start
        found = {
            "speed/images_per_second": self._steps * self._batch_size / seconds,
            "speed/data_seconds": self._waited / self._steps,
            "speed/compute_seconds": (seconds - self._waited) / self._steps,
        }
        if self._utilisation:
            found["speed/mfu"] = self._utilisation * self._steps / seconds
        self._restart()
        stats = [device.memory_stats() or {} for device in jax.local_devices()]  # a CPU has none
        peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
        return found | ({"memory/peak_bytes": max(peaks)} if peaks else {})


class Goodput:
    """Divides the wall time of a start among the steps and everything else."""

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(("startup", "data", "evaluation", "checkpoints"), 0.0)

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts the time of the block as `name`."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def started(self) -> None:
        """Counts the time so far that nothing else was counted for as startup."""
        self._seconds["startup"] += self._total() - sum(self._seconds.values())

    def shares(self) -> dict[str, float]:
        """Returns the shares of the time since the start, which sum to 1; `steps` is the rest."""
        total = self._total()
        return {
            "steps": 1 - sum(self._seconds.values()) / total,
            **{name: seconds / total for name, seconds in self._seconds.items()},
        }

    def line(self) -> str:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares().items())
        return f"wall time {self._total():.0f} s: {shares}"

    def _total(self) -> float:
        return time.perf_counter() - self._start


class StepTrace:
    """Traces some steps with `jax.profiler`, in process 0, whose devices stand for all."""

    def __init__(self, steps: range, directory: Path):
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._directory = directory
        self._running = False

    def begin(self, step: int, state: Any) -> None:
        """Starts the trace before the first of its steps, once earlier ones have ended."""
        if step in self._steps and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._running = True

    def end(self, step: int, state: Any) -> None:
        """Writes the trace once the last of its steps has ended."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes a trace that was begun and not ended."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            log.info("trace of steps in %s", self._directory)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device, None if unknown."""
    starts = [start for start in PEAK_FLOPS if device_kind.startswith(start)]
    return PEAK_FLOPS[max(starts, key=len)] if starts else None


class FiniteWatch:
    """Stops a run whose loss or gradient is not finite and saves the batch for inspection.

    The loss of a step is read after the next step has started, so the device never waits. Each
    process of several saves its own share of the batch under a name of its own.
    """

    def __init__(self, workdir: Path):
        process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
        self._path = workdir / f"nonfinite_batch{process}.npz"
        self._pending = None

    def add(self, step: int, scalars: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> None:
        self.check()
        self._pending = step, scalars, batch

    def check(self) -> None:
        if self._pending is None:
            return
        step, scalars, batch = self._pending
        self._pending = None
        for name in ("loss", "gradient_norm"):
            if not np.isfinite(scalars[name]):
                np.savez(self._path, **batch)
                raise UserError(
                    f"step {step}: {name} {float(scalars[name])} is not finite; the batch is in "
                    f"{self._path}: look at it, or lower config.learning_rate"
                )


class MetricWriter:
    """Writes scalars and images by step to TensorBoard, `metrics.csv` and the log.

    Only process 0 has an active writer. `metrics.csv` has the columns step, name, value. Rows of an
    earlier, killed run beyond `first_step` are dropped, so the file reads like that of one run.
    """

    def __init__(self, workdir: Path, first_step: int, active: bool = True):
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.csv"
        rows = _rows_until(path, first_step)
        text = io.StringIO()
        csv.writer(text).writerows([("step", "name", "value"), *rows])
        write_whole(path, lambda partial: partial.write_text(text.getvalue(), "utf-8", newline=""))
        self._file = path.open("a", encoding="utf-8", newline="")
        self._csv = csv.writer(self._file)
        directory = str(workdir / "tensorboard")
        self._tensorboard = SummaryWriter(directory, purge_step=first_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes to all three. Values in the file are exact (`repr`), so runs can be compared."""
        if not self._active:
            return
        for name, value in scalars.items():
            self._csv.writerow((step, name, repr(float(value))))
            self._tensorboard.add_scalar(name, float(value), step)
        self._file.flush()
        text = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        log.info("step %d: %s", step, text)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes uint8 [H, W, 3] images."""
        if not self._active:
            return
        for name, image in images.items():
            self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the steps and values of each name in `metrics.csv`."""
    found: dict[str, list[tuple[int, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return found


def _rows_until(path: Path, last_step: int) -> list[list[str]]:
    """Returns the rows of an earlier run up to `last_step`, without a half-written last line."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
    return [row for row in rows if int(row[0]) <= last_step]


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: True if the run must save and stop after it, for SIGTERM.

    A cluster may signal one host alone, or several at different times, but all processes must save
    together. jax's own handler, installed by `jax.distributed`, makes several processes agree on a
    step that none has passed. All processes ask once a step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    notified = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: notified.set())
    try:
        yield lambda step: notified.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
