"""Training that is scored while it runs and goes on after a kill: `train_and_evaluate`.

What happens at a start, in this order: the configuration is checked, also against the one that the
workdir was begun with; data, checkpoint and mesh are opened and checked; the state is made from
the converted weights; the latest readable checkpoint, if any, replaces state, data position and
best score; the log is cut back to that step. From there a resumed run repeats what an undisturbed
one does, bit for bit on the same devices.
"""

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from medsam_jax.data.input_pipeline import open_dataset, train_loader
from medsam_jax.data.preprocess import check_compatible
from medsam_jax.errors import UserError
from medsam_jax.models.checkpoint import load_model, save_model
from medsam_jax.models.common import Functional, parameter_names
from medsam_jax.training import optimizer as opt
from medsam_jax.training.checkpoint import TrainCheckpoints
from medsam_jax.training.config import validate
from medsam_jax.training.metric_writer import MetricWriter
from medsam_jax.training.sharding import batch_sharding, make_mesh, put_batch, replicated
from medsam_jax.training.sharding import state_sharding as shard_state
from medsam_jax.training.step import init_state, make_eval_step, make_train_step
from medsam_jax.training.tune import MODEL_INPUTS, TuneEvaluation

log = logging.getLogger(__name__)

# Fields that a resumed run may have other values of: they change how long it runs and what it
# writes, not what a step computes.
MAY_CHANGE = (
    "data_dir",
    "num_workers",
    "mesh",
    "eval_every",
    "eval_overlays",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "early_stop_evals",
)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains by `config` in `workdir`; the same call again resumes.

    Writes `config.json`, `metrics.csv`, `tensorboard/`, `checkpoints/` (training state) and the
    model directories `best/` (by tune DSC) and `last/`, which `load_model` reads.

    Returns:
      The scalars of the last evaluation.

    Raises:
      UserError: bad configuration or data, or a loss that is not finite.
      SystemExit: 143 after SIGTERM, once the state is saved.
    """
    # --- Check everything before the long work.
    workdir = Path(workdir)
    validate(config)
    mesh = make_mesh(config)
    _, info = open_dataset(config.data_dir, "train")
    model = load_model(config.checkpoint)
    check_compatible(info, model.config.preprocessing)
    _check_same_run(config, workdir)

    # --- State and steps.
    functional = Functional(model)
    labels = opt.label_parameters(functional.arrays, parameter_names(model), config.frozen)
    tx = opt.make_optimizer(config, labels)
    state = init_state(functional.arrays, labels, tx, config)
    log.info("parameters\n%s", opt.parameter_table(state.arrays, labels, state.opt_state))
    state_sharding, by_item = shard_state(mesh, state), batch_sharding(mesh)
    state = jax.device_put(state, state_sharding)
    train_step = jax.jit(
        make_train_step(functional, tx, labels, config),
        in_shardings=(state_sharding, by_item),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )
    eval_step = jax.jit(make_eval_step(functional, config.tolerance), out_shardings=by_item)
    evaluate = TuneEvaluation(config, info.modalities, eval_step, by_item)

    # --- Data, and what an earlier run left.
    data = train_loader(
        config.data_dir,
        "train",
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        box_jitter=config.box_jitter,
        num_workers=config.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    checkpoints = TrainCheckpoints(workdir / "checkpoints", config.keep_checkpoints)
    record = {"best_dice": -1.0, "evals_since_best": 0, "tune": {}}
    restored = checkpoints.restore_latest(state, data)
    if restored is not None:
        state, record = restored
        log.info("resumed at step %d of %d", int(state.step), config.num_steps)
    step = int(state.step)
    writer = MetricWriter(workdir, step if restored else -1, active=jax.process_index() == 0)

    def score(step: int) -> None:
        result = evaluate(state.evaluated())
        writer.write_scalars(step, result.scalars)
        writer.write_images(step, result.overlays)
        better = result.dice > record["best_dice"]
        record["evals_since_best"] = 0 if better else record["evals_since_best"] + 1
        record["tune"] = result.scalars
        if better:
            record["best_dice"] = result.dice
            _export(workdir / "best", state, model.config, config, step, result.scalars)

    # --- Train.
    if restored is None:
        score(0)
    watch = FiniteWatch(workdir)
    clock = StepClock()
    with TerminationFlag() as terminated:
        while step < config.num_steps and not _stops_early(config, record):
            with clock.waiting():
                host_batch = next(data)
            batch = put_batch({name: host_batch[name] for name in MODEL_INPUTS}, by_item)
            state, scalars = train_step(state, batch)
            step += 1
            last = step == config.num_steps
            watch.add(step, scalars, host_batch)
            if step % config.log_every == 0 or last:
                watch.check()
                named = {f"train/{name}": float(value) for name, value in scalars.items()}
                writer.write_scalars(step, named | clock.scalars(config.batch_size))
            if step % config.eval_every == 0 or last:
                watch.check()
                score(step)
                clock.restart()
            if step % config.checkpoint_every == 0 or last or terminated:
                watch.check()
                checkpoints.save(step, state, data, record)
            if terminated:
                checkpoints.close()
                log.warning("SIGTERM: saved at step %d; the same command goes on from there", step)
                raise SystemExit(143)

    # --- Leave everything whole.
    checkpoints.save(step, state, data, record)
    _export(workdir / "last", state, model.config, config, step, record["tune"])
    checkpoints.close()
    writer.close()
    log.info("best tune DSC %.4f; %s holds that model", record["best_dice"], workdir / "best")
    return record["tune"]


def _stops_early(config: ml_collections.ConfigDict, record: Mapping[str, Any]) -> bool:
    return 0 < config.early_stop_evals <= record["evals_since_best"]


def _check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes the configuration into a new workdir; refuses one that was begun with another."""
    path = workdir / "config.json"
    now = json.loads(config.to_json_best_effort())
    if path.exists():
        before = json.loads(path.read_text())
        for name in sorted(before.keys() | now.keys()):
            if name not in MAY_CHANGE and before.get(name) != now.get(name):
                raise UserError(
                    f"config.{name}: {now.get(name)!r}, but {workdir} was begun with "
                    f"{before.get(name)!r}; use that value or another --workdir"
                )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(temporary, path)


def _export(directory, state, model_config, config, step, scores) -> None:
    """Writes the evaluated arrays as a model directory, in place of an earlier one."""
    arrays = {name: np.asarray(value) for name, value in state.evaluated().items()}
    if jax.process_index() == 0:
        training = {"config": json.loads(config.to_json_best_effort()), "step": step}
        metadata = {"training": training | {"tune": scores}, "parent": config.checkpoint}
        save_model(directory, arrays, model_config, metadata, overwrite=True)


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
            np.savez(self._path, **{name: batch[name] for name in MODEL_INPUTS})
            raise UserError(
                f"step {step}: loss {float(scalars['loss'])} is not finite; the batch is in "
                f"{self._path}: look at it, or lower config.learning_rate"
            )


class StepClock:
    """Images per second and the share of the time that is spent waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def scalars(self, batch_size: int) -> dict[str, float]:
        """Rates since the last call."""
        seconds = time.perf_counter() - self._start
        rates = {
            "speed/images_per_second": self._steps * batch_size / seconds,
            "speed/data_wait_share": self._waited / seconds,
        }
        self.restart()
        return rates


class TerminationFlag:
    """True once SIGTERM has come: a cluster's notice, minutes before the kill."""

    def __enter__(self) -> "TerminationFlag":
        self._set = False
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *exc_info) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def __bool__(self) -> bool:
        return self._set

    def _on_signal(self, *_) -> None:
        self._set = True
