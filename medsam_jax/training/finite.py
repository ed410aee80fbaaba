"""Stops a run whose loss is not finite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsam_jax.errors import UserError


class FiniteWatch:
    """Stops a run whose loss is not finite, leaving the batch for inspection.

    The loss of a step is read when the next one has been started, so that the device never waits.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / "nonfinite_batch.npz"
        self._pending = None

    def add(self, step: int, scalars: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> None:
        self.check()
        self._pending = step, scalars, batch

    def check(self) -> None:
        if self._pending is None:
            return
        step, scalars, batch = self._pending
        self._pending = None
        if not np.isfinite(scalars["loss"]) or not np.isfinite(scalars["gradient_norm"]):
            np.savez(self._path, **batch)
            raise UserError(
                f"step {step}: loss {float(scalars['loss'])} is not finite; the batch is in "
                f"{self._path}: look at it, or lower config.learning_rate"
            )
