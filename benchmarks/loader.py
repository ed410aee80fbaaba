"""Measures images per second of the input pipeline, and bytes per slice of a built data set.

Example:
  python -m benchmarks.loader --data_dir data --recipe lite --workers 0,1,2
"""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from medsam_jax.cli import run
from medsam_jax.data.datasets import find_dataset
from medsam_jax.data.input_pipeline import train_loader
from medsam_jax.errors import UserError

_DATA_DIR = flags.DEFINE_string("data_dir", None, "What datasets.build was given.", required=True)
_RECIPE = flags.DEFINE_string("recipe", None, "Of the data set, where there are several.")
_WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Images in a batch.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Time spent on each number of workers.")


def images_per_second(data_dir: Path, workers: int) -> float:
    """Returns the steady rate, without the first batches, which start the workers."""
    loader = train_loader(
        data_dir,
        "train",
        batch_size=_BATCH.value,
        seed=0,
        box_jitter=5,
        num_workers=workers,
    )
    for _ in range(2 + workers):
        next(loader)
    batches, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS.value:
        next(loader)
        batches += 1
    return batches * _BATCH.value / (time.perf_counter() - start)


def main(argv: Sequence[str]) -> None:
    """Prints one line for the disk and one for each number of workers."""
    del argv
    if not all(count.isdigit() for count in _WORKERS.value):
        raise UserError(f"--workers: {','.join(_WORKERS.value)}; write numbers, e.g. 0,1,2")
    info = find_dataset(_DATA_DIR.value, _RECIPE.value)
    size = info.record["recipe_fields"]["size"]
    slices = sum(counts["slices"] for counts in info.counts.values())
    stored = sum(path.stat().st_size for path in info.directory.glob("*.array_record*"))
    print(
        f"recipe {info.recipe}, {size} x {size}, {slices} slices, {stored / slices:.0f} bytes each"
    )
    for count in map(int, _WORKERS.value):
        rate = images_per_second(info.directory, count)
        print(f"{count} workers: {rate:.0f} images/s", flush=True)


if __name__ == "__main__":
    run(main)
