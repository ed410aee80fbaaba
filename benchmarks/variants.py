"""Rows of this library alone: cost by batch, image, slices, workers and devices."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.data import ct_slice
from benchmarks.harness import Contender, Row, Work
from benchmarks.training import contender as step


def first_prediction(side: int) -> Work:
    """Runs `set_image` and `predict` with a box on an image of `side` x `side` pixels."""
    from medsam_jax import Predictor, load_model

    predictor = Predictor(load_model("lite_medsam"))
    image, _ = ct_slice(side)
    box = np.array([0.2, 0.3, 0.6, 0.7]) * side

    def run(index):
        predictor.set_image(image)
        return predictor.predict(box=box, multimask_output=False)[0]

    return Work(run)


def encoded_slices(count: int) -> Work:
    """Runs `Predictor.encode` on slices of 512 x 512 pixels."""
    import jax

    from medsam_jax import Predictor, load_model

    predictor = Predictor(load_model("lite_medsam"))
    image, _ = ct_slice(512)

    def run(index):
        encoded = predictor.engine.encode([image] * count)
        jax.block_until_ready([slice_.embedding for slice_ in encoded])
        return np.zeros(1)

    return Work(run, items=count)


def loader(workers: int, batch_size: int = 8) -> Work:
    """Reads batches with the input pipeline from a data set of synthetic scans, built here."""
    import SimpleITK as sitk

    from datasets.medical_slices import building, slices
    from medsam_jax.data.input_pipeline import train_loader

    folder = tempfile.TemporaryDirectory()  # `run` keeps it until the process ends
    path, data_dir = Path(folder.name), str(Path(folder.name) / "data")
    image, labels = ct_slice(256)
    rows = ["case_id,image,mask,modality,task,split"]
    for case, split in enumerate(("train", "train", "tune", "validation")):
        for kind, array in (("image", image), ("mask", labels)):
            volume = sitk.GetImageFromArray(np.stack([array] * 16))
            sitk.WriteImage(volume, path / f"{kind}{case}.nii.gz")
        rows.append(f"p{case},image{case}.nii.gz,mask{case}.nii.gz,MR,organs,{split}")
    (path / "cases.csv").write_text("\n".join(rows) + "\n")
    options = slices.Options(recipe="lite")
    building.build(building.Request(str(path / "cases.csv"), data_dir, options))
    batches = train_loader(
        data_dir, "train", batch_size=batch_size, seed=0, box_jitter=5, num_workers=workers
    )
    for _ in range(2 + workers):  # after these, workers have started and prefetched
        next(batches)

    def run(index, folder=folder):
        for _ in range(10):
            batch = next(batches)
        return batch["image"]

    return Work(run, items=10 * batch_size)


def _variants(name: str, contenders: list[Contender], **options) -> Row:
    return Row(name, "cpu", tuple(contenders), compared=False, rounds=3, **options)


def _alone(function: str, label: str, argument: str, values) -> list[Contender]:
    setup = f"benchmarks.variants:{function}"
    return [Contender(label.format(value), setup, {argument: value}) for value in values]


ROWS = (
    _variants(
        "training step of the decoder, embeddings cached or not, batch 8",
        [
            step("medsam_jax, cached", batch_size=8, cached=True),
            step("medsam_jax, encoder run each time", batch_size=8, cached=False),
        ],
        targets={"medsam_jax, encoder run each time": 0.1},
    ),
    _variants(
        "training step of the decoder on cached embeddings, by batch",
        [step(f"batch {n}", batch_size=n, cached=True) for n in (1, 2, 4, 8, 16)],
    ),
    Row(
        "training step of the decoder on cached embeddings, batch 8, by forced devices",
        "cpu",
        tuple(
            step(
                f"{n} device{'s' if n > 1 else ''}",
                environment={"XLA_FLAGS": f"--xla_force_host_platform_device_count={n}"},
                batch_size=8,
                cached=True,
                devices=n,
            )
            for n in (1, 2, 4, 8)
        ),
        rounds=3,
    ),
    _variants(
        "image set and box answered, by image",
        _alone("first_prediction", "{0} x {0}", "side", (256, 512, 1024, 2048)),
    ),
    _variants(
        "slices encoded, by number", _alone("encoded_slices", "{} slices", "count", (1, 4, 16))
    ),
    _variants("input pipeline, batches of 8", _alone("loader", "{} workers", "workers", (0, 1, 2))),
)
