"""Programs as the compilers for TPU and H100 make them: what each may take at most.

`make test-accelerators` runs these in an environment with libtpu and jax's CUDA plugin. They need
neither device. docs/performance.md has the whole table.
"""

import pytest

from benchmarks.accelerators import compile_apart

LIMIT = 1200  # seconds, on a busy machine


@pytest.mark.parametrize(
    ("program", "target", "kernels", "gigabytes"),
    [
        ("decoder lite_medsam, boxes 1", "h100", 150, 0.25),
        ("decoder lite_medsam, boxes 64", "h100", 200, 9),
        ("encoder lite_medsam, batch 1", "h100", 250, 2.5),
        ("encoder vit_b, batch 1", "h100", 140, 3.5),
        ("decoder lite_medsam, boxes 1", "v5e", None, 0.25),
    ],
)
def test_kernels_traffic_and_loops(program, target, kernels, gigabytes):
    row = compile_apart(program, target, LIMIT)
    assert row["error"] is None
    assert row["traffic"] <= gigabytes * 1e9
    if kernels is not None:
        assert row["kernels"] <= kernels
    if program.startswith("decoder"):
        assert row["loops"] == 0
    assert row["unknown_trips"] == 0


def test_a_cached_step_fits_its_device():
    row = compile_apart("train lite_medsam, cached", "h100", LIMIT)
    assert row["error"] is None
    assert row["loops"] == 0
    assert row["peak"] < 2**30


def test_a_program_that_does_not_fit_is_a_row_with_the_reason():
    row = compile_apart("decoder lite_medsam, boxes 32768", "h100", LIMIT)
    assert "GiB, the device has 79.1" in row["error"]


def test_a_program_that_takes_too_long_is_a_row_with_the_reason():
    row = compile_apart("decoder lite_medsam, boxes 1", "h100", 0.5)
    assert row == {
        "program": "decoder lite_medsam, boxes 1",
        "target": "h100",
        "error": "not compiled after 0.5 s",
    }
