"""Rows that compare storing a slice with MedSAM's steps: skimage's resize, then np.save."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import Contender, Row, Work


def ct_slice(side: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Returns a CT-like uint8 slice and its label map: a body with organs, texture and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side - 0.5
    body = (x / 0.42) ** 2 + (y / 0.3) ** 2 < 1
    labels = np.zeros((side, side), np.uint8)
    grey = np.where(body, 90.0, 0.0)
    for label in range(1, 6):
        centre, radius = rng.uniform(-0.2, 0.2, 2), rng.uniform(0.03, 0.08)
        organ = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        labels[organ] = label
        grey[organ] = 90 + 15 * label
    grey += np.where(body, rng.normal(0, 4, grey.shape), 0)
    return np.clip(grey, 0, 255).astype(np.uint8), labels


def ours(recipe: str) -> Work:
    """Resizes, encodes as PNG and appends to an ArrayRecord file, as `datasets.build` does."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from datasets.medical_slices.slices import encode_image, encode_mask
    from medsam_jax.data.preprocess import resize_image, resize_mask
    from medsam_jax.data.recipes import RECIPES

    image, labels = ct_slice()
    folder = tempfile.TemporaryDirectory()  # `run` keeps it until the process ends
    writer = ArrayRecordWriter(str(Path(folder.name) / "slices"), "group_size:1")

    def run(index, folder=folder):
        del index
        stored, _ = resize_image(image, RECIPES[recipe])
        mask = resize_mask(labels, RECIPES[recipe])
        writer.write(encode_image(stored[:, :, 0]).getvalue() + encode_mask(mask).getvalue())
        return stored, mask

    return Work(run, bytes=image.nbytes + labels.nbytes)


def medsam(size: int) -> Work:
    """Runs the steps after windowing of `pre_CT_MR.py` (v2), github.com/bowang-lab/MedSAM."""
    from skimage import transform

    image, labels = ct_slice()
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)

    def run(index, folder=folder):
        del index
        colours = np.repeat(image[:, :, None], 3, axis=-1)
        resized = transform.resize(
            colours, (size, size), order=3, preserve_range=True, mode="constant", anti_aliasing=True
        )
        unit = (resized - resized.min()) / np.clip(resized.max() - resized.min(), 1e-8, None)
        mask = transform.resize(
            labels, (size, size), order=0, preserve_range=True, mode="constant", anti_aliasing=False
        )
        np.save(path / "image.npy", unit)
        np.save(path / "mask.npy", np.uint8(mask))
        return np.uint8(resized), np.uint8(mask)

    return Work(run)


def _row(recipe: str, size: int) -> Row:
    return Row(
        name=f"one CT slice 512 x 512 to {size} x {size}, stored",
        suite="cpu",
        contenders=(
            Contender("medsam_jax", "benchmarks.data:ours", {"recipe": recipe}),
            Contender("MedSAM", "benchmarks.data:medsam", {"size": size}),
        ),
        targets={"MedSAM": 0.05},
        tolerance=1 / 150,  # one grey level (floor of float32, of float64) where 180 is white
    )


ROWS = (_row("v2", 1024), _row("v1", 256))
