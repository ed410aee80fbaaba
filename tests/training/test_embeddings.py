"""Embeddings are computed on all devices of a process, and are those of one device."""

import os
import subprocess
import sys

import numpy as np

from tests.training.runs import QUICK, ROOT

PROGRAM = """
import sys
import jax, numpy as np
from medsam_jax.models.functional import Functional
from medsam_jax.training.embeddings import on_local_devices
from tests.tiny import tiny_sam

encode, batch_size = on_local_devices(Functional(tiny_sam()), "float32")
assert batch_size == jax.device_count(), batch_size
images = np.random.default_rng(0).integers(0, 255, (4, 256, 256, 3), np.uint8)
valid = np.array([[256, 256], [200, 256], [256, 100], [256, 256]], np.int32)
parts = [slice(i, i + batch_size) for i in range(0, 4, batch_size)]
found = [encode(images[part], valid[part]) for part in parts]
assert all(len(part.sharding.device_set) == jax.device_count() for part in found)
assert all(len(shard.data) == 1 for part in found for shard in part.addressable_shards)
np.save(sys.argv[1], np.concatenate(found))
"""


def test_four_devices_encode_as_one(tmp_path):
    for count in (1, 4):
        flags = f"{QUICK['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        program = [sys.executable, "-c", PROGRAM, str(tmp_path / f"{count}.npy")]
        environment = os.environ | QUICK | {"XLA_FLAGS": flags}
        run = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    one, four = (np.load(tmp_path / f"{count}.npy") for count in (1, 4))
    np.testing.assert_allclose(four, one, rtol=1e-6, atol=1e-6)
