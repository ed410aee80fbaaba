"""Training checkpoints, from which a run resumes exactly, and the model directories of a run.

Orbax writes state, data position and score together under a temporary name, which it renames when
all is written. A kill at any moment leaves the previous checkpoint whole.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.experimental import multihost_utils

from medsam_jax.errors import UserError, disk_space
from medsam_jax.io.files import plain_path, require_space
from medsam_jax.models.checkpoint import read_extras, read_metadata, save_model
from medsam_jax.models.sam import SamConfig
from medsam_jax.models.unet import UNetConfig
from medsam_jax.training import lora
from medsam_jax.training.step import TrainState

log = logging.getLogger(__name__)


class TrainCheckpoints:
    """The latest `keep` numbered checkpoints of a run, saved in the background."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory.parent)
        self._last_step: int | None = None  # saved or restored; the same in every process
        self._unchecked: int | None = None  # saved, and not read back yet
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Grain's handler writes at once in every process, so the folder must exist by then.
        folders_first = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, async_options=folders_first
        )
        return ocp.CheckpointManager(
            plain_path(self.directory), options=options, handler_registry=_handlers()
        )

    def save(self, step: int, state: TrainState, data: Any, progress: dict[str, Any]) -> None:
        """Starts to save; `progress` is small JSON: best score, evaluations since then.

        Raises:
          UserError: the disk is full, or was full for the previous save; or that one cannot be read
            back.
        """
        if step == self._last_step:
            return
        self._finish()
        self._last_step = step
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=CheckpointSave(data),
            progress=ocp.args.JsonSave(progress),
        )
        with disk_space(self.directory):
            self._manager.save(step, args=items)
        self._unchecked = step

    def restore_latest(
        self, template: TrainState, data: Any
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest readable checkpoint, laid out like `template`; None without any.

        `data` is set to the checkpoint's position. An unreadable checkpoint is renamed to
        `STEP.unreadable` with a warning, and the previous one is tried.

        Raises:
          UserError: no checkpoint can be read although there are some, or too little disk space.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(template))
        # One more than is kept, while it is written.
        more = max(self._keep + 1 - len(steps), 1)
        require_space(self.directory, more * size, f"{more} checkpoints")
        for step in steps:
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(
                            template, ocp.checkpoint_utils.construct_restore_args(template)
                        ),
                        data=CheckpointRestore(data),
                        progress=ocp.args.JsonRestore(),
                    ),
                )
            except Exception as error:  # whatever a damaged file makes Orbax or TensorStore raise
                self._set_aside(step, error)
            else:
                self._last_step = step
                return restored.state, restored.progress
        if steps:
            raise UserError(
                f"{self.directory}: no checkpoint of steps {steps} can be read; they are set aside "
                "as *.unreadable: start again in another workdir"
            )
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        damaged = self.directory / str(step)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning("%s cannot be read (%s); set aside, taking the one before", damaged, reason)
        if jax.process_index() == 0:
            os.rename(damaged, damaged.with_suffix(".unreadable"))
        self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        """Waits for the last save. Raises UserError as `save`."""
        self._finish()
        self._manager.close()

    def _finish(self) -> None:
        """Waits for the save in progress, and reads its names and shapes back."""
        step, self._unchecked = self._unchecked, None
        with disk_space(self.directory):
            self._manager.wait_until_finished()
        if step is None or jax.process_index() != 0:
            return
        try:
            if self._manager.item_metadata(step)["state"] is None:
                raise FileNotFoundError("it has no arrays")
        except Exception as error:  # as in `restore_latest`
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(
                f"{self.directory / str(step)}: was written and cannot be read back ({reason}); "
                "use another --workdir"
            ) from error


def _remove_leftovers(workdir: Path) -> None:
    """Deletes half-written model directories of a killed run; the resumed run writes them again."""
    if jax.process_index() == 0:
        for name in ("best", "last"):
            for path in workdir.glob(f".{name}.*"):
                shutil.rmtree(path)


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Returns Orbax's handlers, changed so that one device writes a replicated array.

    By default several devices write a part each, and each part compiles a program of its own.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("state", args, state)
    return registry


class Exporter:
    """Writes the evaluated arrays as a model directory that `load_model` reads.

    Adapters are added to their kernels. model.json records the run's configuration, step, tune
    scores, and `seen`: the cases and scans (`data.manifest.training_record`).
    """

    def __init__(
        self,
        model_config: SamConfig | UNetConfig,
        config: ml_collections.ConfigDict,
        origin: Path,
        seen: Mapping[str, Any],
    ):
        self._model_config = model_config
        self._adapter_scale = lora.scale_of(config)
        self._extras = read_extras(origin)
        stored = read_metadata(origin)
        self._metadata = {
            **{name: stored[name] for name in ("licence", "credit", "source") if name in stored},
            "training": {"config": json.loads(config.to_json_best_effort()), **seen},
        }

    def __call__(
        self, directory: Path, state: TrainState, step: int, scores: Mapping[str, float]
    ) -> None:
        """Writes `directory` whole. On a full disk an earlier export stays (UserError)."""
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
