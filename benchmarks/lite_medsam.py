"""Rows that compare LiteMedSAM with PyTorch and ONNX Runtime on equal weights and inputs."""

import multiprocessing
import os
from pathlib import Path

import numpy as np

from benchmarks.counting import least_work
from benchmarks.harness import Contender, Row, Work
from benchmarks.models import (
    INPUTS,
    KEEP_BUFFERS,
    jax_lite_medsam,
    torch_encoder_work,
    torch_lite_medsam,
)

ONNX_FOLDER = Path("benchmarks/results/onnx")


def images(batch: int) -> list[np.ndarray]:
    """Returns images [B, 256, 256, 3] in [0, 1] of noise blocks, so that no region is constant."""
    rng = np.random.default_rng(0)
    coarse = rng.random((INPUTS, batch, 32, 32, 3), np.float32)
    return list(coarse.repeat(8, axis=2).repeat(8, axis=3))


def jax_encoder(batch: int, dtype: str = "float32") -> Work:
    """Runs the image encoder under one jit, as `Sam.encode` calls it."""
    import jax

    from medsam_jax.ops.compile import jit
    from medsam_jax.ops.strips import image_by_image

    functional = jax_lite_medsam(dtype)
    arrays = {k: x for k, x in functional.arrays.items() if k.startswith("image_encoder.")}
    others = {k: x for k, x in functional.arrays.items() if k not in arrays}

    def encoder(arrays, x):
        model = functional.bind({**others, **arrays})
        return image_by_image(model.image_encoder, x, functional.form).astype(x.dtype)

    encode = jit(encoder, functional.form)
    inputs = [jax.device_put(image) for image in images(batch)]
    counted = least_work(encoder, arrays, inputs[0])
    return Work(
        lambda i: encode(arrays, inputs[i % INPUTS]).block_until_ready(), items=batch, **counted
    )


def torch_encoder(batch: int, dtype: str = "float32") -> Work:
    return torch_encoder_work(torch_lite_medsam().image_encoder, images(batch), dtype)


def onnx_encoder(batch: int) -> Work:
    """Runs PyTorch's encoder exported to ONNX for this batch, with all graph optimisations."""
    import onnxruntime

    path = ONNX_FOLDER / f"lite_medsam_encoder_{batch}.onnx"
    if not path.exists():  # in its own process, so that its memory is not counted
        export = multiprocessing.get_context("spawn").Process(
            target=_export_encoder, args=(path, batch)
        )
        export.start()
        export.join()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [np.ascontiguousarray(image.transpose(0, 3, 1, 2)) for image in images(batch)]

    def run(index):
        (embedding,) = session.run(None, {"image": inputs[index % INPUTS]})
        return embedding.transpose(0, 2, 3, 1)

    return Work(run, items=batch)


def _export_encoder(path: Path, batch: int) -> None:
    import torch

    from medsam_jax.io.files import write_whole

    image = torch.from_numpy(images(batch)[0]).permute(0, 3, 1, 2)
    encoder = torch_lite_medsam().image_encoder
    names = {"input_names": ["image"], "output_names": ["embedding"]}
    names |= {"opset_version": 17, "dynamo": False}
    write_whole(path, lambda partial: torch.onnx.export(encoder, (image,), str(partial), **names))


_HERE = "benchmarks.lite_medsam:"


def _encoder_row(batch: int, targets: dict[str, float], dtype: str = "float32") -> Row:
    arguments = {"batch": batch, "dtype": dtype}
    contenders = [
        Contender("medsam_jax", f"{_HERE}jax_encoder", arguments),
        Contender("PyTorch", f"{_HERE}torch_encoder", arguments),
        Contender("PyTorch, buffers kept", f"{_HERE}torch_encoder", arguments, KEEP_BUFFERS),
    ]
    name = f"LiteMedSAM encoder, batch {batch}"
    if dtype != "float32":
        # Each side differs from float32 by 4 to 6 % of the largest value.
        precision = {"precision": dtype, "tolerance": 0.1}
        return Row(f"{name}, {dtype}", "cpu", tuple(contenders), targets, **precision)
    contenders.append(Contender("ONNX Runtime", f"{_HERE}onnx_encoder", {"batch": batch}))
    return Row(name, "cpu", tuple(contenders), targets, memory_targets={"PyTorch": 1.0})


ROWS = (
    _encoder_row(1, {"ONNX Runtime": 0.85, "PyTorch": 0.5}),
    _encoder_row(8, {"ONNX Runtime": 0.7, "PyTorch": 0.2}),
    _encoder_row(1, {}, "bfloat16"),
    _encoder_row(8, {}, "bfloat16"),
)
