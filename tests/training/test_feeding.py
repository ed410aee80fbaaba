"""Batches on the devices ahead of the step: order, number, and what a checkpoint keeps."""

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.data.input_pipeline import _WorkerBatches
from medsam_jax.training.checkpoint import TrainCheckpoints
from medsam_jax.training.config import base_config
from medsam_jax.training.feeding import DeviceBatches
from medsam_jax.training.sharding import batch_sharding, make_mesh
from medsam_jax.training.step import TrainState


class Loader:
    """Grain's iterator, or ours of worker processes, which Grain does not know; counts batches."""

    def __init__(self, ours: bool):
        zeros = np.zeros((8, 2, 2), np.uint8)
        numbers = grain.MapDataset.range(100).map(
            lambda number: (
                {"image": zeros, "mask": zeros, "box": zeros}
                | {"valid_shape": np.full((8, 2), number)}
            )
        )
        batches = iter(numbers.to_iter_dataset())
        self.batches = _WorkerBatches(batches) if ours else batches
        self.get_state, self.set_state = self.batches.get_state, self.batches.set_state
        self.read = 0

    def __next__(self):
        self.read += 1
        return next(self.batches)


def feed(ours: bool) -> tuple[DeviceBatches, Loader]:
    loader = Loader(ours)
    return DeviceBatches(loader, batch_sharding(make_mesh(base_config()))), loader


def taken(batches: DeviceBatches) -> int:
    """Returns the number of the batch, the same on host and devices."""
    host, placed = batches.take()
    assert all(isinstance(array, jax.Array) for array in placed.values())
    assert np.array_equal(host["valid_shape"], placed["valid_shape"])
    return int(host["valid_shape"][0, 0])


@pytest.mark.parametrize("ours", [False, True], ids=["grain", "workers"])
def test_a_checkpoint_knows_nothing_of_the_batch_ahead(tmp_path, ours):
    batches, loader = feed(ours)
    for number in range(3):
        assert taken(batches) == number
        batches.load()
        batches.load()  # is there already
        assert loader.read == number + 2
    one = {"w": jnp.ones(2)}
    state = TrainState(jnp.int32(3), one, (), one)
    checkpoints = TrainCheckpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(3, state, batches, {})
    assert taken(batches) == 3
    checkpoints.close()

    resumed, loader = feed(ours)
    resumed.load()  # read before the restore, and dropped
    checkpoints = TrainCheckpoints(tmp_path / "checkpoints", 1)
    restored, _ = checkpoints.restore_latest(state, resumed)
    checkpoints.close()
    assert [taken(resumed) for _ in range(2)] == [3, 4]
    assert int(restored.step) == 3
