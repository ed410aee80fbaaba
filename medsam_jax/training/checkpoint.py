"""Training checkpoints: everything that a run needs to go on as if it had never stopped.

Orbax writes state, data position and score together under a temporary name and renames when all is
there, so a kill at any moment leaves the checkpoint before whole.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from grain.checkpoint import CheckpointRestore, CheckpointSave

from medsam_jax.errors import UserError, disk_space, require_space
from medsam_jax.training.step import TrainState

log = logging.getLogger(__name__)


class TrainCheckpoints:
    """The numbered checkpoints of a run, saved in the background, the latest `keep` of them."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self._keep = keep
        _remove_leftovers(directory.parent)
        self._last_step: int | None = None  # saved or restored; alike in every process
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Grain's handler writes at once, in every process, so process 0 must have made the folder:
        # with folders made in the background another process did not find it.
        folders_first = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, async_options=folders_first
        )
        return ocp.CheckpointManager(
            self.directory.absolute(), options=options, handler_registry=_handlers()
        )

    def save(self, step: int, state: TrainState, data: Any, progress: dict[str, Any]) -> None:
        """Starts to save; `progress` is small JSON: best score, evaluations since.

        Raises:
          UserError: the disk is full, also when the save before this one found it so.
        """
        if step == self._last_step:
            return
        self._last_step = step
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=CheckpointSave(data),
            progress=ocp.args.JsonSave(progress),
        )
        with disk_space(self.directory):
            self._manager.save(step, args=items)

    def restore_latest(
        self, template: TrainState, data: Any
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, laid out like `template`; None without any.

        `data` is set to its position. A checkpoint that cannot be read is set aside as
        `STEP.unreadable` with a warning, and the one before is taken.

        Raises:
          UserError: there are checkpoints and none can be read, or too little space for more.
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
        """Waits for the last save. Raises UserError where the disk is full."""
        with disk_space(self.directory):
            self._manager.wait_until_finished()
            self._manager.close()


def _remove_leftovers(workdir: Path) -> None:
    """Model directories that a kill has left half written; the resumed run writes them again."""
    if jax.process_index() == 0:
        for name in ("best", "last"):
            for path in workdir.glob(f".{name}.*"):
                shutil.rmtree(path)


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Orbax's, but a replicated array is written by one device.

    By default several write a part each, and cutting it compiles a program for every shape and
    device: three steps of a tiny model on 8 devices, with two checkpoints, took 16 s in place of 1.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("state", args, state)
    return registry
