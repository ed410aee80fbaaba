"""Rows of both suites."""

from benchmarks import (
    data,
    decoder,
    gpu,
    lite_medsam,
    metrics,
    startup,
    training,
    variants,
    vit_b,
    weights,
)
from benchmarks.harness import Row


def every_row(points: int) -> list[Row]:
    """Returns the rows of both suites; automatic masks use `points` per side."""
    return [
        *lite_medsam.ROWS,
        *vit_b.ROWS,
        *decoder.ROWS,
        decoder.automatic_row(points),
        *training.ROWS,
        *variants.ROWS,
        *data.ROWS,
        *metrics.ROWS,
        *weights.ROWS,
        *startup.ROWS,
        *gpu.ROWS,
    ]
