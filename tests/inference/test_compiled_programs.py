"""Programs are kept in Python without being asked for, unless jax's own settings say otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax, numpy as np
{setting}
jax.jit(lambda x: x - 1)(1.0)  # compiled before there is a predictor
from medsam_jax.inference.predictor import Predictor
from medsam_jax.models.checkpoint import abstract_model, build_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.unet import UNetConfig
config = UNetConfig.tiny()
shapes = flatten_state(abstract_model(config)).items()
model = build_model(config, {{name: np.zeros(x.shape, x.dtype) for name, x in shapes}}, "test")
Predictor(model), Predictor(model)
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
"""


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("", "library/xla"),
        ("jax.config.update('jax_compilation_cache_dir', 'mine')", "mine"),
        ("jax.config.update('jax_enable_compilation_cache', False)", ""),
    ],
)
def test_first_predictor_keeps_programs(tmp_path, setting, kept):
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment |= {"MEDSAM_JAX_CACHE": str(tmp_path / "library"), "PYTHONPATH": str(root)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # quick ones too
    command = [sys.executable, "-c", CODE.format(setting=setting)]
    subprocess.run(command, cwd=tmp_path, check=True, env=environment)
    folders = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*-cache")}
    assert folders == ({kept} if kept else set())


def test_a_cache_that_cannot_be_written_costs_one_line(tmp_path):
    (tmp_path / "file").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment |= {"MEDSAM_JAX_CACHE": str(tmp_path / "file")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", CODE.format(setting="")]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert done.stderr.count("programs are compiled at every start") == 1
