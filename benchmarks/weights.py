"""Rows of weight loading: time and memory from a PyTorch file of ViT-B's size to a model."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import Contender, Row, Work
from benchmarks.worker import peak_memory

CONVERTED = "converted"
PROBE = "mask_decoder.iou_token"  # the tensor that is compared, a small one


def _write(path: Path, converted: bool) -> None:
    """Writes 375 MB of random weights with segment_anything's names, optionally converted too."""
    from medsam_jax.io.tensors import LazyTensor
    from medsam_jax.models.checkpoint import abstract_model
    from medsam_jax.models.functional import flatten_state
    from medsam_jax.models.sam import SamConfig
    from weights_converter.convert import convert
    from weights_converter.names import torch_leaf
    from weights_converter.pth_writer import write_pth

    rng, tensors = np.random.default_rng(0), {}
    for our_name, variable in flatten_state(abstract_model(SamConfig.vit_b())).items():
        name, leaf = torch_leaf(our_name, len(variable.shape))
        value = 0.02 * rng.standard_normal(variable.shape, np.float32)
        tensors[name] = LazyTensor.of(leaf.to_torch(value))
    write_pth(str(path), tensors)
    if converted:
        convert(str(path), str(path.parent / CONVERTED))


def _prepared(converted: bool = False) -> tuple[tempfile.TemporaryDirectory, Path]:
    """Writes the file in its own process, whose memory is not measured; returns folder and path."""
    import multiprocessing

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "sam_vit_b.pth"
    writer = multiprocessing.get_context("spawn").Process(target=_write, args=(path, converted))
    writer.start()
    writer.join()
    return folder, path


def converted() -> Work:
    """Converts the file to a checkpoint directory."""
    from weights_converter.convert import convert

    folder, path = _prepared()

    def run(index, folder=folder):
        directory = path.parent / CONVERTED
        convert(str(path), str(directory), overwrite=True)
        return np.array([sum(f.stat().st_size for f in directory.rglob("*")) / 1e9])

    return Work(run, bytes=2 * path.stat().st_size)


def loaded() -> Work:
    """Loads a checkpoint directory into a model."""
    import jax

    from medsam_jax import load_model
    from medsam_jax.models.functional import flatten_state

    folder, path = _prepared(converted=True)
    directory = path.parent / CONVERTED

    def run(index, folder=folder):
        arrays = jax.block_until_ready(flatten_state(load_model(str(directory))))
        return np.asarray(arrays[f"{PROBE}.embedding"])

    return _with_memory_of_one(run, path)


def torch_loaded() -> Work:
    """Runs segment_anything's `build_sam_vit_b`, which calls `torch.load`."""
    from tests.parity.torch_models import stub_torchvision

    with stub_torchvision():
        from segment_anything import sam_model_registry
    folder, path = _prepared()

    def run(index, folder=folder):
        model = sam_model_registry["vit_b"](checkpoint=str(path))
        return model.get_parameter(f"{PROBE}.weight").detach().numpy()

    return _with_memory_of_one(run, path)


def _with_memory_of_one(load: Callable[[int], np.ndarray], path: Path) -> Work:
    """Measures the peak of the first load only, because glibc keeps memory that later ones free."""
    peaks = []

    def run(index):
        loaded = load(index)
        peaks.append(peak_memory())
        return loaded

    return Work(run, bytes=path.stat().st_size, peak_memory=lambda: peaks[0])


ROWS = (
    Row(
        "weights of ViT-B to a model",
        "cpu",
        (
            Contender("medsam_jax, converted before", "benchmarks.weights:loaded"),
            Contender("PyTorch, segment_anything", "benchmarks.weights:torch_loaded"),
        ),
        memory_targets={"PyTorch, segment_anything": 1.0},
        rounds=5,
    ),
    Row(
        "weights of ViT-B converted",
        "cpu",
        (Contender("medsam_jax", "benchmarks.weights:converted"),),
        compared=False,
        rounds=3,
    ),
)
