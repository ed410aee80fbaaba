"""The embedding pass uses all devices of a process, and gives the embeddings of one device."""

import os
import subprocess
import sys

import numpy as np

from tests.training.runs import QUICK, ROOT

PROGRAM = """
import sys
import jax, numpy as np
from medsam_jax.data.datasets import open_dataset
from medsam_jax.inference.engine import Engine
from medsam_jax.models.checkpoint import read_config, read_params
from medsam_jax.training.config import base_config
from medsam_jax.training.embeddings import cached_embeddings
from medsam_jax.training.setup import set_up

used, embed = [], Engine.embed
def spy(self, stored, valid_shapes, size=None):
    result = embed(self, stored, valid_shapes, size)
    used.append((len(stored), len(result.sharding.device_set)))
    return result
Engine.embed = spy

config = base_config()
checkpoint, config.data_dir, config.embedding_cache, found = sys.argv[1:]
config.checkpoint, config.embedding_dtype = checkpoint, "float32"
model_config = read_config(checkpoint)
run = set_up(config, model_config, params=read_params(checkpoint))
_, info = open_dataset(config.data_dir, "tune")
tune = cached_embeddings(config, run.functional, run.labels, model_config, info)["tune"]
count = jax.device_count()
assert set(used) == {(count, count)}, used
np.save(found, np.stack([tune[position] for position in range(len(tune))]))
"""


def test_four_devices_encode_as_one(tiny_checkpoint, built, tmp_path):
    for count in (1, 4):
        flags = f"{QUICK['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        paths = (tiny_checkpoint, built, tmp_path / f"cache{count}", tmp_path / f"{count}.npy")
        program = [sys.executable, "-c", PROGRAM, *map(str, paths)]
        environment = os.environ | QUICK | {"XLA_FLAGS": flags}
        run = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    one, four = (np.load(tmp_path / f"{count}.npy") for count in (1, 4))
    assert one.std() > 0
    np.testing.assert_allclose(four, one, rtol=1e-6, atol=1e-6)
