"""Rows of start-up time: whole processes with imports and compilation, up to the first mask."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import Contender, Row, Work

IMPORTS = {
    "medsam_jax": "import medsam_jax",
    "a predictor": "from medsam_jax import Predictor, load_model",
    "segment_anything": "from tests.parity.torch_models import stub_torchvision\n"
    "with stub_torchvision(): import segment_anything",
    "transformers": "from transformers import SamModel",
}
BOX = "np.array([100.0, 150.0, 300.0, 350.0])"
FIRST_MASK = {
    "medsam_jax": f"""
import numpy as np
from benchmarks.data import ct_slice
from medsam_jax import Predictor, load_model
from medsam_jax.io.files import keep_compiled_programs
keep_compiled_programs()
predictor = Predictor(load_model("lite_medsam"))
predictor.set_image(ct_slice()[0])
masks, _, _ = predictor.predict(box={BOX}, multimask_output=False)
print(masks.mean())
""",
    "PyTorch": f"""
import numpy as np, torch
from benchmarks.data import ct_slice
from medsam_jax.data.recipes import get_recipe
from medsam_jax.data.preprocess import resize_image
from tests.parity.torch_models import load_torch_lite_medsam
model = load_torch_lite_medsam()
image = torch.from_numpy(resize_image(ct_slice()[0], get_recipe("lite"))[0]).float()
image = (image - image.min()) / (image.max() - image.min())
with torch.no_grad():
    logits = model(image.permute(2, 0, 1)[None], {BOX}[None] / 2)
    mask = model.postprocess_masks(logits, (256, 256), (512, 512)) > 0
print(mask.float().mean().item())
""",
}


def process(code: str) -> Work:
    """Runs a Python process with `code`."""
    return Work(lambda index: np.array([_last_number(code, os.environ)]), peak_memory=_peak_memory)


def first_mask(code: str, cold: bool = False) -> Work:
    """Runs a process from its start to a mask; with `cold`, the compilation cache is empty."""
    folder = tempfile.TemporaryDirectory()

    def run(index, folder=folder):
        cache = Path(folder.name) / "xla"
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        return np.array([_last_number(code, environment)])

    return Work(run, peak_memory=_peak_memory)


def _peak_memory() -> int:
    """Returns the peak memory of the largest child process in bytes."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _last_number(code: str, environment) -> float:
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return float((answer.stdout.split() or ["0"])[-1])


def _first_mask(name: str, who: str, **arguments) -> Contender:
    arguments["code"] = FIRST_MASK[who]
    return Contender(name, "benchmarks.startup:first_mask", arguments)


ROWS = (
    Row(
        "import",
        "cpu",
        tuple(
            Contender(name, "benchmarks.startup:process", {"code": code})
            for name, code in IMPORTS.items()
        ),
        compared=False,
        rounds=3,
    ),
    Row(
        "start of a process to the first mask",
        "cpu",
        (
            _first_mask("medsam_jax", "medsam_jax"),
            _first_mask("medsam_jax, nothing compiled before", "medsam_jax", cold=True),
            _first_mask("PyTorch", "PyTorch"),
        ),
        tolerance=1e-3,  # a pixel at the threshold may differ
        rounds=3,
    ),
)
