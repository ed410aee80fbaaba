"""Model directories of a run: what is evaluated, as a checkpoint that `load_model` reads."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from medsam_jax.io.files import disk_space
from medsam_jax.models.checkpoint import read_extras, read_metadata, save_model
from medsam_jax.models.sam import SamConfig
from medsam_jax.training import lora
from medsam_jax.training.step import TrainState


class Exporter:
    """Writes the evaluated arrays as a model directory, with what they came from and how.

    Adapters are added to their kernels, so the directory is like that of any other model.
    """

    def __init__(
        self,
        model_config: SamConfig,
        config: ml_collections.ConfigDict,
        origin: Path,
    ):
        self._model_config = model_config
        self._adapter_scale = lora.scale_of(config)
        self._extras = read_extras(origin)
        stored = read_metadata(origin)
        self._metadata = {
            **{name: stored[name] for name in ("licence", "credit", "source") if name in stored},
            "training": {"config": json.loads(config.to_json_best_effort())},
        }

    def __call__(
        self, directory: Path, state: TrainState, step: int, scores: Mapping[str, float]
    ) -> None:
        """Replaces an earlier export, which stays where the disk is full (UserError)."""
        arrays = {
            name: np.asarray(value)
            if value.is_fully_addressable or value.is_fully_replicated
            else multihost_utils.process_allgather(value, tiled=True)
            for name, value in state.evaluated().items()
        }
        if jax.process_index() == 0:
            arrays = lora.merge(arrays, self._adapter_scale)
            training = self._metadata["training"] | {"step": step, "tune": dict(scores)}
            metadata = self._metadata | {"training": training}
            with disk_space(directory):
                save_model(
                    directory, arrays, self._model_config, metadata, self._extras, overwrite=True
                )
