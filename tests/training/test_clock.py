"""Rates and utilisation by arithmetic; the table of peaks by the names that jax gives devices."""

import types

import pytest

from medsam_jax.training import monitor
from medsam_jax.training.monitor import Goodput, StepClock, peak_flops


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_peak_by_the_longest_start_that_fits(device_kind, peak):
    assert peak_flops(device_kind) == peak


@pytest.mark.usefixtures("unchecked")  # a step that only knows its cost
def test_seconds_are_split_and_utilisation_is_flops_over_peak(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    device = types.SimpleNamespace(
        device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: {"peak_bytes_in_use": 7}
    )
    monkeypatch.setattr(monitor.jax, "devices", lambda: [device])
    monkeypatch.setattr(monitor.jax, "local_devices", lambda: [device])
    step = types.SimpleNamespace(cost_analysis=lambda: {"flops": 98.9e12})
    clock = StepClock(batch_size=8)
    for _ in range(4):
        with clock.waiting():
            now[0] += 0.25
        with clock.paused():  # compilation, before the first step has ended
            now[0] += 1000
            clock.measure(step, accumulation_steps=2)
        now[0] += 0.75
    assert clock.scalars() == pytest.approx(
        {
            "speed/images_per_second": 8.0,
            "speed/data_seconds": 0.25,
            "speed/compute_seconds": 0.75,
            "speed/mfu": 0.2,
            "memory/peak_bytes": 7,
        }
    )


def test_the_shares_of_the_wall_time_sum_to_one(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    goodput = Goodput()
    now[0] += 3  # reading the checkpoint
    for name, seconds in (("evaluation", 2), ("data", 1), ("checkpoints", 2)):
        with goodput.of(name):
            now[0] += seconds
        if name == "evaluation":
            now[0] += 1  # compiling the step
            goodput.started()
    now[0] += 7
    expected = {"steps": 7, "startup": 4, "data": 1, "evaluation": 2, "checkpoints": 2}
    assert goodput.shares() == pytest.approx({name: x / 16 for name, x in expected.items()})
    assert goodput.line() == (
        "wall time 16 s: steps 43.8%, startup 25.0%, data 6.2%, evaluation 12.5%, checkpoints 12.5%"
    )
