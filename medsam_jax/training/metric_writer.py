"""Where a run's numbers and pictures go: TensorBoard, `metrics.csv` and the log."""

import csv
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes scalars and images by step; only the first process of a run has one that is active.

    `metrics.csv` has the columns step, name, value. What an earlier, killed run wrote beyond
    `first_step` is dropped, so that the file reads as if there had been one run.
    """

    def __init__(self, workdir: Path, first_step: int, active: bool = True):
        self._active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.csv"
        rows = _rows_until(path, first_step)
        temporary = path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "name", "value"), *rows])
        os.replace(temporary, path)
        self._file = path.open("a", newline="")
        self._csv = csv.writer(self._file)
        directory = str(workdir / "tensorboard")
        self._tensorboard = SummaryWriter(directory, purge_step=first_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes to all three; values in the file are exact (`repr`), for comparing runs."""
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


def _rows_until(path: Path, last_step: int) -> list[list[str]]:
    """The whole rows of an earlier run up to `last_step`; a half-written last line is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
    return [row for row in rows if int(row[0]) <= last_step]
