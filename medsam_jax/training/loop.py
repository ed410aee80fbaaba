"""Training that is scored while it runs and goes on after a kill: `train_and_evaluate`.

What happens at a start, in this order: the configuration is checked, also against the one that the
workdir was begun with; data, checkpoint and mesh are opened and checked; the state is made from
the converted weights; the latest readable checkpoint, if any, replaces state, data position and
best score; the log is cut back to that step. From there a resumed run repeats what an undisturbed
one does, bit for bit on the same devices.
"""

import contextlib
import dataclasses
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
from jax.experimental import multihost_utils

from medsam_jax.data.datasets import DatasetInfo, open_dataset
from medsam_jax.data.embedding_cache import Embeddings, cache_key, open_or_build
from medsam_jax.data.input_pipeline import train_loader
from medsam_jax.data.preprocess import PREPROCESSING, check_compatible
from medsam_jax.errors import UserError
from medsam_jax.models.checkpoint import (
    build_model,
    read_config,
    read_extras,
    read_metadata,
    read_params,
    resolve,
    save_model,
)
from medsam_jax.models.common import Functional, parameter_names
from medsam_jax.models.sam import SamConfig
from medsam_jax.models.unet import UNetConfig
from medsam_jax.training import optimizer as opt
from medsam_jax.training.checkpoint import TrainCheckpoints
from medsam_jax.training.config import augmentation_of, base_config, validate
from medsam_jax.training.metric_writer import MetricWriter
from medsam_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    model_inputs,
    put_batch,
    replicated,
    shard_state,
)
from medsam_jax.training.step import TrainState, encode, init_state, make_eval_step, make_train_step
from medsam_jax.training.tune import TuneEvaluation

log = logging.getLogger(__name__)

# Fields that a resumed run may have other values of: they change how long it runs and what it
# writes, not what a step computes.
MAY_CHANGE = (
    "data_dir",
    "embedding_cache",
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
    model directories `best/` (by `TuneResult.score`) and `last/`, which `load_model` reads.

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
    origin = resolve(config.checkpoint)
    stored_config = read_config(origin)
    model_config = configured(stored_config, config)
    check_compatible(info, model_config.preprocessing)
    _check_same_run(config, workdir)

    # --- State and steps.
    model = build_model(model_config, read_params(origin), str(origin))
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

    # --- Data, and what an earlier run left.
    embeddings = _embeddings(config, functional, labels, model_config, info)
    evaluate = TuneEvaluation(config, info, eval_step, by_item, embeddings["tune"])
    data = train_loader(
        config.data_dir,
        "train",
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        box_jitter=config.box_jitter,
        prompts_per_image=config.prompts_per_image,
        positive_points=config.positive_points if config.point_share else 0,
        negative_points=config.negative_points if config.point_share else 0,
        point_share=config.point_share or None,
        temperature=config.sampling_temperature,
        augmentation=augmentation_of(config),
        num_workers=config.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        embeddings=embeddings["train"],
    )
    with contextlib.ExitStack() as stack:
        checkpoints = TrainCheckpoints(workdir / "checkpoints", config.keep_checkpoints)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore_latest(state, data)
        state, record = restored or (state, {"best_score": -1.0, "evals_since_best": 0})
        step = int(state.step)
        log.info("%s at step %d of %d", "resumed" if restored else "new", step, config.num_steps)
        first_step = step if restored else -1
        writer = MetricWriter(workdir, first_step, active=jax.process_index() == 0)
        stack.callback(writer.close)
        exported_config = dataclasses.replace(
            stored_config, preprocessing=model_config.preprocessing
        )
        export = Exporter(exported_config, config, origin)

        def score(step: int) -> None:
            result = evaluate(state.evaluated())
            writer.write_scalars(step, result.scalars)
            writer.write_images(step, result.overlays)
            better = result.score > record["best_score"]
            record["evals_since_best"] = 0 if better else record["evals_since_best"] + 1
            record["tune"] = result.scalars
            if better:
                record["best_score"] = result.score
                export(workdir / "best", state, step, result.scalars)

        # --- Train.
        if not restored:
            score(0)
        watch, clock = FiniteWatch(workdir), StepClock()
        terminated = stack.enter_context(TerminationFlag())
        while step < config.num_steps and not _stops_early(config, record):
            with clock.waiting():
                host_batch = next(data)
            batch = put_batch(model_inputs(host_batch), by_item)
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
                checkpoints.save(step, state, data, dict(record))
            if terminated:
                log.warning("SIGTERM: saved at step %d; the same command goes on from there", step)
                raise SystemExit(143)

        # --- Leave everything whole.
        checkpoints.save(step, state, data, dict(record))
        export(workdir / "last", state, step, record["tune"])
    log.info("best tune score %.4f; %s holds that model", record["best_score"], workdir / "best")
    return record["tune"]


def configured(stored: SamConfig, config: ml_collections.ConfigDict) -> SamConfig:
    """The checkpoint's model as this run computes it."""
    if isinstance(stored, UNetConfig) and (config.point_share or config.iou_weight):
        field = "point_share" if config.point_share else "iou_weight"
        raise UserError(
            f"config.{field}: {config[field]} given, but a U-Net knows neither points nor the "
            "predicted IoU; set it to 0"
        )
    changes = {"dtype": config.dtype}
    if config.preprocessing:
        changes["preprocessing"] = PREPROCESSING[config.preprocessing]
        if changes["preprocessing"].image_size != stored.image_size:
            raise UserError(
                f"config.preprocessing: {config.preprocessing!r} gives inputs of "
                f"{changes['preprocessing'].image_size} pixels, {stored.name} takes "
                f"{stored.image_size}"
            )
    if config.remat:
        if not hasattr(stored.encoder, "remat"):
            raise UserError(f"config.remat: only a ViT has it, not {stored.name}; leave it False")
        changes["encoder"] = dataclasses.replace(stored.encoder, remat=True)
    return dataclasses.replace(stored, **changes)


def _stops_early(config: ml_collections.ConfigDict, record: Mapping[str, Any]) -> bool:
    return 0 < config.early_stop_evals <= record["evals_since_best"]


def _check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes the configuration into a new workdir; refuses one that was begun with another."""
    path = workdir / "config.json"
    now = json.loads(config.to_json_best_effort())
    if path.exists():
        # A field that this program has got since then had the effect of its default.
        defaults = json.loads(base_config().to_json_best_effort())
        before = defaults | json.loads(path.read_text())
        may_change = MAY_CHANGE + (("num_steps",) if config.schedule == "constant" else ())
        for name in sorted(before.keys() | now.keys()):
            if name not in may_change and before.get(name) != now.get(name):
                raise UserError(
                    f"config.{name}: {now.get(name)!r}, but {workdir} was begun with "
                    f"{before.get(name)!r}; use that value or another --workdir"
                )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(temporary, path)


def _embeddings(
    config: ml_collections.ConfigDict,
    functional: Functional,
    labels: Mapping[str, str],
    model_config: SamConfig,
    info: DatasetInfo,
) -> dict[str, Embeddings | None]:
    """The cached embeddings of both splits, computed where they are missing; None without cache."""
    if not config.embedding_cache:
        return {"train": None, "tune": None}
    encoder = {n: x for n, x in functional.arrays.items() if n.startswith("image_encoder.")}
    trained = [name for name in encoder if labels[name] != opt.FROZEN]
    if trained:
        raise UserError(
            f"config.embedding_cache: {len(trained)} arrays of the image encoder are trained, such "
            f"as {trained[0]}, so embeddings change; freeze them or empty this field"
        )
    dtype = config.embedding_dtype
    size = model_config.embedding_size
    shape = (size, size, model_config.embed_dim)
    key = cache_key(encoder, model_config.preprocessing, info, shape, dtype)
    encode_slices = jax.jit(
        lambda arrays, images, valid: encode(functional.bind(arrays), images, valid).astype(dtype)
    )
    # A CPU's caches hold the feature maps of one slice: four together took half as long again.
    batch_size = 1 if jax.default_backend() == "cpu" else 16
    return {
        split: open_or_build(
            config.embedding_cache,
            key,
            config.data_dir,
            split,
            lambda images, valid: np.asarray(encode_slices(functional.arrays, images, valid)),
            batch_size,
        )
        for split in ("train", "tune")
    }


class Exporter:
    """Writes the evaluated arrays as a model directory, with what they came from and how."""

    def __init__(
        self,
        model_config: SamConfig,
        config: ml_collections.ConfigDict,
        origin: Path,
    ):
        self._model_config = model_config
        self._extras = read_extras(origin)
        stored = read_metadata(origin)
        self._metadata = {
            **{name: stored[name] for name in ("licence", "credit", "source") if name in stored},
            "training": {"config": json.loads(config.to_json_best_effort())},
        }

    def __call__(
        self, directory: Path, state: TrainState, step: int, scores: Mapping[str, float]
    ) -> None:
        """Replaces an earlier export."""
        arrays = {
            name: multihost_utils.process_allgather(value, tiled=True)
            if jax.process_count() > 1
            else np.asarray(value)
            for name, value in state.evaluated().items()
        }
        if jax.process_index() == 0:
            training = self._metadata["training"] | {"step": step, "tune": dict(scores)}
            metadata = self._metadata | {"training": training}
            save_model(
                directory, arrays, self._model_config, metadata, self._extras, overwrite=True
            )


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
