"""Rows that compare LiteMedSAM here with PyTorch and ONNX Runtime, same weights and inputs."""

import multiprocessing
import os
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.harness import Contender, Row, Work

INPUTS = 4  # different inputs that calls take turns with
ONNX_FOLDER = Path("benchmarks/results/onnx")

# PyTorch returns large buffers to the system after each layer and faults their pages in again;
# with these settings glibc keeps them. Both ways of running it are in the table.
KEEP_BUFFERS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def images(batch: int) -> list[np.ndarray]:
    """Normalised images [B, 256, 256, 3] in [0, 1]: blocks of noise, so not constant anywhere."""
    rng = np.random.default_rng(0)
    coarse = rng.random((INPUTS, batch, 32, 32, 3), np.float32)
    return list(coarse.repeat(8, axis=2).repeat(8, axis=3))


def point_prompts(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Single foreground points: coordinates [P, 1, 2] in pixels of the input, labels [P, 1]."""
    rng = np.random.default_rng(1)
    labels = np.ones((count, 1), np.int32)
    return [(rng.uniform(0, 255, (count, 1, 2)).astype(np.float32), labels) for _ in range(INPUTS)]


@cache
def _embedding() -> np.ndarray:
    """A stand-in embedding [64, 64, 256] with the spread of real ones (LayerNorm's output)."""
    return np.random.default_rng(2).standard_normal((64, 64, 256), np.float32)


def jax_encoder(batch: int) -> Work:
    """`model.image_encoder` under one jit, as our predictor and trainer call it."""
    import jax

    functional = _jax_model()
    arrays = functional.arrays
    encode = jax.jit(lambda arrays, x: functional.bind(arrays).image_encoder(x))
    inputs = [jax.device_put(image) for image in images(batch)]
    operations = encode.lower(arrays, inputs[0]).cost_analysis().get("flops")
    return Work(lambda i: encode(arrays, inputs[i % INPUTS]).block_until_ready(), operations)


def torch_encoder(batch: int) -> Work:
    import torch

    model = _torch_model()
    inputs = [torch.from_numpy(image).permute(0, 3, 1, 2).contiguous() for image in images(batch)]

    @torch.no_grad()
    def run(index):
        return model.image_encoder(inputs[index % INPUTS]).permute(0, 2, 3, 1).numpy()

    return Work(run)


def onnx_encoder(batch: int) -> Work:
    """PyTorch's encoder exported for this batch, all graph optimisations on."""
    import onnxruntime

    path = ONNX_FOLDER / f"lite_medsam_encoder_{batch}.onnx"
    if not path.exists():  # in a process of its own: its memory is not the runtime's
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

    return Work(run)


def _export_encoder(path: Path, batch: int) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    image = torch.from_numpy(images(batch)[0]).permute(0, 3, 1, 2)
    encoder = _torch_model().image_encoder
    names = {"input_names": ["image"], "output_names": ["embedding"]}
    torch.onnx.export(encoder, (image,), str(partial), opset_version=17, dynamo=False, **names)
    partial.rename(path)


def jax_decoder(prompts: int) -> Work:
    """Point prompts on one embedding: prompt encoder and decoder, three masks each."""
    import jax

    functional = _jax_model()
    arrays, embedding = functional.arrays, jax.device_put(_embedding()[None])

    @jax.jit
    def decode(arrays, embedding, coords, labels):
        model = functional.bind(arrays)
        return model.decode(embedding, points=(coords, labels), multimask_output=True)

    inputs = [
        (jax.device_put(coords[None]), jax.device_put(labels[None]))
        for coords, labels in point_prompts(prompts)
    ]
    operations = decode.lower(arrays, embedding, *inputs[0]).cost_analysis().get("flops")

    def run(index):
        logits, iou = jax.block_until_ready(decode(arrays, embedding, *inputs[index % INPUTS]))
        return logits[0], iou[0]

    return Work(run, operations)


def torch_decoder(prompts: int) -> Work:
    from tests.parity.torch_models import torch_decode

    model, embedding = _torch_model(), _embedding()
    inputs = [{"points": coords, "labels": labels} for coords, labels in point_prompts(prompts)]
    return Work(lambda index: torch_decode(model, embedding, inputs[index % INPUTS], True))


def _jax_model():
    from medsam_jax import load_model
    from medsam_jax.models.common import Functional

    return Functional(load_model("lite_medsam"))


def _torch_model():
    import torch

    from tests.parity.torch_models import load_torch_lite_medsam

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return load_torch_lite_medsam()


def _encoder_row(batch: int, targets: dict[str, float]) -> Row:
    arguments = {"batch": batch}
    return Row(
        name=f"lite_medsam encoder, batch {batch}",
        suite="cpu",
        contenders=(
            Contender("ours", "benchmarks.lite_medsam:jax_encoder", arguments),
            Contender("PyTorch", "benchmarks.lite_medsam:torch_encoder", arguments),
            Contender(
                "PyTorch, buffers kept",
                "benchmarks.lite_medsam:torch_encoder",
                arguments,
                KEEP_BUFFERS,
            ),
            Contender("ONNX Runtime", "benchmarks.lite_medsam:onnx_encoder", arguments),
        ),
        targets=targets,
    )


def _decoder_row(prompts: int, targets: dict[str, float]) -> Row:
    arguments = {"prompts": prompts}
    return Row(
        name=f"lite_medsam decoder, {prompts} point prompts",
        suite="cpu",
        contenders=(
            Contender("ours", "benchmarks.lite_medsam:jax_decoder", arguments),
            Contender("PyTorch", "benchmarks.lite_medsam:torch_decoder", arguments),
            Contender(
                "PyTorch, buffers kept",
                "benchmarks.lite_medsam:torch_decoder",
                arguments,
                KEEP_BUFFERS,
            ),
        ),
        targets=targets,
    )


ROWS = (
    _encoder_row(1, {"ONNX Runtime": 0.85, "PyTorch": 0.5}),
    _encoder_row(8, {"ONNX Runtime": 0.7, "PyTorch": 0.2}),
    _decoder_row(1, {}),
    _decoder_row(16, {}),
    _decoder_row(64, {"PyTorch": 0.5}),
)
