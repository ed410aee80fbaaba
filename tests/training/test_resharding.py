"""A run goes on with half the devices, and with its state split otherwise."""

import os
import subprocess

import ml_collections
import numpy as np

from medsam_jax.training.config import base_config
from medsam_jax.training.loop import train_and_evaluate
from tests.training.runs import ROOT, command, values


def test_eight_devices_then_four_equal_one(fields, tmp_path):
    fields = fields | {"batch_size": 8, "eval_every": 8}
    config: ml_collections.ConfigDict = base_config()
    config.update(fields)
    train_and_evaluate(config, tmp_path / "one")

    constant = {"schedule": "constant", "warmup_steps": 0}
    for devices, fsdp, num_steps in ((8, 4, 4), (4, 2, 8)):
        changed = {"num_steps": num_steps, "mesh.fsdp": fsdp}
        forced = f"--xla_force_host_platform_device_count={devices}"
        run = subprocess.run(
            command(tmp_path / "halved", fields | constant | changed),
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": forced, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            encoding="utf-8",
        )
        assert run.returncode == 0, run.stderr
    assert "resumed at step 4 of 8" in run.stderr
    expected, found = (values(tmp_path / name, "train/loss") for name in ("one", "halved"))
    assert list(found) == list(expected) == list(range(1, 9))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
