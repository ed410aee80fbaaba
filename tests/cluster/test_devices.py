"""One device and eight, with the state on each or split, then on half of them: the same losses."""

import json

import numpy as np
import pytest

from tests.training.runs import train, values


@pytest.fixture(scope="module")
def twenty_steps(fields) -> dict:
    once = {"eval_every": 20, "checkpoint_every": 10}
    return fields | once | {"batch_size": 8, "num_steps": 20}


@pytest.fixture(scope="module")
def expected(twenty_steps, tmp_path_factory) -> dict[int, float]:
    workdir = tmp_path_factory.mktemp("one")
    train(workdir, twenty_steps)
    losses = values(workdir, "train/loss")
    assert list(losses) == list(range(1, 21))
    assert losses[20] < losses[1]
    return losses


def check(workdir, expected) -> None:
    found = values(workdir, "train/loss")
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def split_arrays(workdir) -> int:
    """Counts the state arrays that the checkpoint of step 10 lists as sharded over devices."""
    layouts = json.loads((workdir / "checkpoints" / "10" / "state" / "_sharding").read_text())
    return sum("fsdp" in json.loads(layout)["partition_spec"] for layout in layouts.values())


def check_compilations(said: str) -> None:
    """The steps, and few others: not one to cut every array for the mesh or a checkpoint."""
    assert "Compiling jit(train_step)" in said
    assert "_multi_slice" not in said
    assert said.count("Compiling") < 60


def test_eight_devices_train_as_one(twenty_steps, expected, tmp_path):
    check_compilations(train(tmp_path, twenty_steps, devices=8))
    assert split_arrays(tmp_path) == 0
    check(tmp_path, expected)


def test_a_split_state_goes_on_with_half_the_devices(twenty_steps, expected, tmp_path):
    said = train(tmp_path, twenty_steps | {"mesh.fsdp": 4, "num_steps": 10}, devices=8)
    check_compilations(said)
    assert split_arrays(tmp_path) > 0
    said = train(tmp_path, twenty_steps | {"mesh.fsdp": 2}, devices=4)
    assert "resumed at step 10 of 20" in said
    check(tmp_path, expected)
