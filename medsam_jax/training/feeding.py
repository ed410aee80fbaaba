"""Training batches on the devices, one ahead of the step that takes them: `DeviceBatches`."""

import json
from typing import Any

import jax
from jax.sharding import NamedSharding

from medsam_jax.training.sharding import model_inputs, put_batch


class DeviceBatches:
    """Puts batches on the devices in the loader's order, while an earlier step computes.

    At most two are there: the one that a step uses and the next. The state is the loader's after
    the last batch that was taken, so a checkpoint knows nothing of what was read ahead. It is JSON
    bytes, which Grain's checkpoint handler writes for iterators that are not its own.

    Args:
      batches: iterator of `train_loader`, with `get_state` and `set_state`.
      sharding: of a batch.
    """

    def __init__(self, batches: Any, sharding: NamedSharding):
        self._batches, self._sharding = batches, sharding
        self._state = self._position()
        self._ahead: tuple[dict[str, Any], dict[str, jax.Array], bytes] | None = None

    def load(self) -> None:
        """Reads the next batch and starts to copy it, without waiting for the devices."""
        if self._ahead is None:
            batch = next(self._batches)
            placed = put_batch(model_inputs(batch), self._sharding)
            self._ahead = batch, placed, self._position()

    def take(self) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Returns the next batch as the loader made it, and its arrays on the devices."""
        self.load()
        batch, placed, self._state = self._ahead
        self._ahead = None
        return batch, placed

    def get_state(self) -> bytes:
        return self._state

    def set_state(self, state: bytes) -> None:
        self._batches.set_state(json.loads(state))
        self._state, self._ahead = state, None

    def start_prefetch(self) -> None:
        """Does nothing: the handler calls it after a restore, and the loader begins by itself."""

    def _position(self) -> bytes:
        return json.dumps(self._batches.get_state(), indent=4).encode()
