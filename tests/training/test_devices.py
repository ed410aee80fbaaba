"""One device, eight, and eight with the state split between them give the same losses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

# Twenty steps from the same weights on the same batches; prints the losses as JSON.
TWENTY_STEPS = """
import json, sys
import jax, numpy as np
from medsam_jax.data.input_pipeline import train_loader
from medsam_jax.models.checkpoint import load_model
from medsam_jax.models.common import Functional, parameter_names
from medsam_jax.training import optimizer as opt
from medsam_jax.training.config import base_config
from medsam_jax.training.sharding import *
from medsam_jax.training.step import init_state, make_train_step

checkpoint, data_dir, fsdp = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = base_config()
config.update({"learning_rate": 1e-3, "batch_size": 8, "mesh": {"data": -1, "fsdp": fsdp}})
functional = Functional(model := load_model(checkpoint))
labels = opt.label_parameters(functional.arrays, parameter_names(model), config.frozen)
tx = opt.make_optimizer(config, labels)
mesh = make_mesh(config)
state = init_state(functional.arrays, labels, tx, config)
placement = shard_state(mesh, state)
state = jax.device_put(state, placement)
step = jax.jit(
    make_train_step(functional, tx, labels, config),
    in_shardings=(placement, batch_sharding(mesh)),
    out_shardings=(placement, replicated(mesh)),
    donate_argnums=0,
)
data = train_loader(data_dir, "train", batch_size=8, seed=0, box_jitter=5)
losses = []
for _ in range(20):
    state, scalars = step(state, put_batch(model_inputs(next(data)), batch_sharding(mesh)))
    losses.append(float(scalars["loss"]))
split = [x for x in jax.tree.leaves(state) if not x.is_fully_replicated]
print(json.dumps({"devices": jax.device_count(), "losses": losses, "split": len(split)}))
"""


def run(checkpoint, data_dir, devices: int, fsdp: int) -> dict:
    flags = f"--xla_force_host_platform_device_count={devices}"
    arguments = [sys.executable, "-c", TWENTY_STEPS, str(checkpoint), str(data_dir), str(fsdp)]
    result = subprocess.run(
        arguments,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["devices"] == devices
    return report


@pytest.fixture(scope="module")
def one_device(tiny_checkpoint, built) -> list[float]:
    return run(tiny_checkpoint, built, 1, 1)["losses"]


@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_train_as_one(tiny_checkpoint, built, one_device, fsdp):
    report = run(tiny_checkpoint, built, 8, fsdp)
    assert (report["split"] > 0) == (fsdp > 1)
    np.testing.assert_allclose(report["losses"], one_device, rtol=1e-5)
    assert report["losses"][-1] < report["losses"][0]
