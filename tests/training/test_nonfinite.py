"""Each process of a run saves its own share of a batch whose loss is not finite."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.training.monitor import FiniteWatch
from tests.training.runs import ROOT, free_port

PROGRAM = """
import sys
import numpy as np
from pathlib import Path
from medsam_jax.distributed import join_processes
from medsam_jax.errors import UserError
from medsam_jax.training.monitor import FiniteWatch

workdir, coordinator, process_id = sys.argv[1:]
join_processes(False, coordinator, 2, int(process_id))
watch = FiniteWatch(Path(workdir))
scalars = {"loss": np.float32("nan"), "gradient_norm": np.float32(1)}
watch.add(3, scalars, {"image": np.full((2, 4), int(process_id))})
try:
    watch.check()
except UserError as error:
    print(error, flush=True)
"""


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    watch = FiniteWatch(tmp_path)
    scalars = {"loss": jnp.float32(0.5), "gradient_norm": jnp.float32("inf")}
    watch.add(3, scalars, {"image": np.ones(1)})
    with pytest.raises(UserError, match="step 3: gradient_norm inf is not finite"):
        watch.check()
    with np.load(tmp_path / "nonfinite_batch.npz") as batch:
        assert batch["image"] == [1]


def test_each_process_saves_its_own_batch(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), address, str(index)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, line in enumerate(told):
        path = tmp_path / f"nonfinite_batch_process{index}.npz"
        assert line.startswith("step 3: loss nan is not finite")
        assert str(path) in line
        with np.load(path) as batch:
            np.testing.assert_array_equal(batch["image"], index)
