"""How fast a run is, what it waits for, how much of the devices it uses."""

import contextlib
import time
from collections.abc import Iterator

import jax

# Dense bfloat16 FLOP/s of one jax device, by the start of its `device_kind`; makers' data sheets.
# A core of TPU v2 and v3 is a device, half a chip.
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
    """Images per second, a step's seconds by what they went to, and model FLOP utilisation."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._utilisation = 0.0  # of a step that takes a second
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._waited = 0, 0.0

    def measure(self, step: jax.stages.Compiled, accumulation_steps: int) -> None:
        """Takes the step's FLOP from XLA; without a known peak of the device there is no MFU.

        XLA counts the part of the step that one device does, recomputation (`remat`) included, and
        the body of the accumulation's loop once.
        """
        flops = (step.cost_analysis() or {}).get("flops", 0.0) * accumulation_steps
        peak = peak_flops(jax.devices()[0].device_kind)
        self._utilisation = flops / peak if peak else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step: compilation, evaluation."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of each step's batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def scalars(self) -> dict[str, float]:
        """Means since the last call, and the most memory that a device of this process has held."""
        seconds = time.perf_counter() - self._start
        found = {
            "speed/images_per_second": self._steps * self._batch_size / seconds,
            "speed/data_seconds": self._waited / self._steps,
            "speed/compute_seconds": (seconds - self._waited) / self._steps,
        }
        if self._utilisation:
            found["speed/mfu"] = self._utilisation * self._steps / seconds
        self._restart()
        return found | memory_scalars()


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None where it is not known."""
    starts = [start for start in PEAK_FLOPS if device_kind.startswith(start)]
    return PEAK_FLOPS[max(starts, key=len)] if starts else None


def memory_scalars() -> dict[str, float]:
    """The most bytes in use at a time on the fullest device; empty where it does not tell (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return {"memory/peak_bytes": max(peaks)} if peaks else {}
