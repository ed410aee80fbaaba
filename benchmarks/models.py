"""Models that rows compare: ours and PyTorch's, with the same weights."""

import os
from functools import cache

import numpy as np

from benchmarks.harness import Work

# PyTorch returns large buffers to the system after each layer, and new ones cause page faults. With
# these settings glibc keeps the buffers. The table has PyTorch with and without them.
KEEP_BUFFERS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
INPUTS = 4  # number of inputs that the calls alternate between


def jax_lite_medsam(dtype: str = "float32", devices: int = 1):
    """Returns our LiteMedSAM with the released weights, as a `Functional` in `dtype`."""
    import dataclasses

    from medsam_jax.hub import resolve
    from medsam_jax.models.checkpoint import build_model, read_config, read_params
    from medsam_jax.models.functional import Functional
    from medsam_jax.ops.form import local_form

    directory = resolve("lite_medsam")
    config = dataclasses.replace(read_config(directory), dtype=dtype)
    model = build_model(config, read_params(directory), str(directory))
    return Functional(model, local_form(devices))


def torch_lite_medsam():
    """Returns the authors' LiteMedSAM with the released weights; uses one thread per core."""
    import torch

    from tests.parity.torch_models import load_torch_lite_medsam

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return load_torch_lite_medsam()


def torch_encoder_work(encode, images: list[np.ndarray], dtype: str = "float32") -> Work:
    """Runs `encode` on images [B, S, S, 3], passed to PyTorch as [B, 3, S, S].

    bfloat16 uses autocast, which keeps norms and softmax in float32, as our model does.
    """
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    inputs = [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in images]

    @torch.no_grad()
    def run(index):
        with half:
            embedding = encode(inputs[index % INPUTS])
        return embedding.float().permute(0, 2, 3, 1).numpy()

    return Work(run, items=len(images[0]))


def segment_anything_lite_medsam(pixel_mean: float, pixel_std: float):
    """Wraps PyTorch LiteMedSAM in segment_anything's `Sam`, as its predictor and generator need.

    Args:
      pixel_mean, pixel_std: minimum and range of one image, so that `Sam.preprocess` equals
        LiteMedSAM's normalisation of that image.
    """
    from tests.parity.torch_models import stub_torchvision

    with stub_torchvision():
        from segment_anything.modeling import Sam
    model = torch_lite_medsam()
    return Sam(
        model.image_encoder,
        model.prompt_encoder,
        model.mask_decoder,
        [pixel_mean] * 3,
        [pixel_std] * 3,
    ).eval()


@cache
def stand_in_embedding() -> np.ndarray:
    """Returns a random embedding [64, 64, 256] scaled like a real one, which ends in LayerNorm."""
    return np.random.default_rng(2).standard_normal((64, 64, 256), np.float32)
