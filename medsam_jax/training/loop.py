"""Training that is scored while it runs and goes on after a kill: `train_and_evaluate`.

What happens at a start, in this order: the configuration is checked, also against the one that the
workdir was begun with; data, checkpoint and mesh are opened and checked; the state is made from
the converted weights; the latest readable checkpoint, if any, replaces state, data position and
best score; the log is cut back to that step. From there a resumed run repeats what an undisturbed
one does, bit for bit on the same devices.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from medsam_jax.cli import progress
from medsam_jax.data.datasets import DatasetInfo, open_dataset
from medsam_jax.data.input_pipeline import train_loader
from medsam_jax.data.preprocess import PREPROCESSING, check_compatible
from medsam_jax.errors import UserError
from medsam_jax.hub import resolve
from medsam_jax.models.checkpoint import build_model, read_config, read_params
from medsam_jax.models.functional import Functional, parameter_names
from medsam_jax.models.sam import SamConfig
from medsam_jax.models.unet import UNetConfig
from medsam_jax.ops.compile import jit
from medsam_jax.training import optimizer as opt
from medsam_jax.training.checkpoint import TrainCheckpoints
from medsam_jax.training.clock import StepClock
from medsam_jax.training.config import augmentation_of, validate
from medsam_jax.training.embeddings import cached_embeddings
from medsam_jax.training.export import Exporter
from medsam_jax.training.finite import FiniteWatch
from medsam_jax.training.lora import adapted
from medsam_jax.training.metric_writer import MetricWriter
from medsam_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    model_inputs,
    place,
    put_batch,
    replicated,
    shard_state,
)
from medsam_jax.training.step import init_state, make_eval_step, make_train_step, parts_of_batch
from medsam_jax.training.termination import Termination
from medsam_jax.training.validation import TuneEvaluation
from medsam_jax.training.workdir import check_same_run, record_start

log = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains by `config` in `workdir`; the same call again resumes.

    Writes `config.json`, `run.json` (each start's circumstances), `metrics.csv`, `tensorboard/`,
    `checkpoints/` (training state) and the model directories `best/` (by `TuneResult.score`) and
    `last/`, which `load_model` reads.

    Returns:
      The scalars of the last evaluation.

    Raises:
      UserError: bad configuration or data, a full disk, or a loss that is not finite.
      SystemExit: 143 after SIGTERM, once the state is saved.
    """
    # --- Check everything before the long work.
    workdir = Path(workdir)
    validate(config)
    mesh = make_mesh(config)
    info = _checked_dataset(config.data_dir, config.task)
    origin = resolve(config.checkpoint)
    stored_config = read_config(origin)
    model_config = configured(stored_config, config)
    check_compatible(info, model_config.preprocessing)
    exported_config = trained_for(stored_config, config, info.ct_windows("train", config.task))
    _check_objects_are_told_apart(info, model_config, config.task)
    check_same_run(config, workdir)

    # --- State and steps.
    model = build_model(model_config, read_params(origin), str(origin))
    functional = adapted(Functional(model), config)
    labels = opt.label_parameters(functional.arrays, parameter_names(model), config.frozen)
    tx = opt.make_optimizer(config, labels)
    state = init_state(functional.arrays, labels, tx, config)
    log.info("parameters\n%s", opt.parameter_table(state.arrays, labels, state.opt_state))
    state_sharding, by_item = shard_state(mesh, state), batch_sharding(mesh)
    state = jax.tree.map(place, state, state_sharding)
    train_step = jit(
        make_train_step(functional, tx, labels, config, parts_of_batch(model, config)),
        in_shardings=(state_sharding, by_item),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )
    eval_step = jit(make_eval_step(functional, config.tolerance), out_shardings=by_item)

    # --- Data, and what an earlier run left.
    embeddings = cached_embeddings(config, functional, labels, model_config, info)
    evaluate = TuneEvaluation(config, info, eval_step, by_item, embeddings["tune"])
    data = train_loader(
        config.data_dir,
        "train",
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        task=config.task,
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
        variants=config.embedding_variants,
    )
    with contextlib.ExitStack() as stack:
        checkpoints = TrainCheckpoints(workdir / "checkpoints", config.keep_checkpoints)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore_latest(state, data)
        state, record = restored or (state, {"best_score": -1.0, "evals_since_best": 0})
        step = int(state.step)
        log.info("%s at step %d of %d", "resumed" if restored else "new", step, config.num_steps)
        record_start(config, workdir, info, step)
        first_step = step if restored else -1
        writer = MetricWriter(workdir, first_step, active=jax.process_index() == 0)
        stack.callback(writer.close)
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
        watch, clock = FiniteWatch(workdir), StepClock(config.batch_size)
        termination = stack.enter_context(Termination())
        program = None
        last_step = step if _stops_early(config, record) else config.num_steps
        steps = range(step + 1, last_step + 1)
        for step in progress(steps, "training") if jax.process_index() == 0 else steps:
            with clock.waiting():
                host_batch = next(data)
            batch = put_batch(model_inputs(host_batch), by_item)
            if program is None:
                log.info("compiling the training step")
                with clock.paused():
                    program = train_step.lower(state, batch).compile()
                clock.measure(program, config.accumulation_steps)
            state, scalars = program(state, batch)
            last = step == config.num_steps
            watch.add(step, scalars, host_batch)
            terminated = termination.due(step)
            if step % config.log_every == 0 or last:
                watch.check()
                named = {f"train/{name}": float(value) for name, value in scalars.items()}
                writer.write_scalars(step, named | clock.scalars())
            if step % config.eval_every == 0 or last:
                watch.check()
                with clock.paused():
                    score(step)
            if step % config.checkpoint_every == 0 or last or terminated:
                watch.check()
                checkpoints.save(step, state, data, dict(record))
            if terminated:
                log.warning("SIGTERM: saved at step %d; the same command goes on from there", step)
                raise SystemExit(143)
            if _stops_early(config, record):
                break

        # --- Leave everything whole.
        checkpoints.save(step, state, data, dict(record))
        export(workdir / "last", state, step, record["tune"])
    log.info("best tune score %.4f; %s holds that model", record["best_score"], workdir / "best")
    return record["tune"]


def _checked_dataset(data_dir: str, task: str) -> DatasetInfo:
    """The data set; UserError where one of the two splits that training needs has no objects."""
    for split in ("train", "tune"):
        _, info = open_dataset(data_dir, split)
        if len(info.objects(split, task)[0]) == 0:
            raise UserError(
                f"{info.directory}: split {split!r} holds no object; give cases with masks to it "
                "in the manifest's split column"
            )
    return info


def trained_for(
    stored: SamConfig | UNetConfig,
    config: ml_collections.ConfigDict,
    ct_windows: tuple[str, ...] = (),
) -> SamConfig | UNetConfig:
    """The checkpoint's model as this run leaves it: with the contracts that it is trained for.

    `ct_windows` are those of the slices it is trained on; without CT the contract's stay.
    """
    if isinstance(stored, UNetConfig) and (config.point_share or config.iou_weight):
        field = "point_share" if config.point_share else "iou_weight"
        raise UserError(
            f"config.{field}: {config[field]} given, but a U-Net knows neither points nor the "
            "predicted IoU; set it to 0"
        )
    changes = {}
    if config.point_share and config.iou_weight:  # automatic masks choose by the predicted IoU
        changes["automatic_prompts"] = "points"
    if config.preprocessing:
        changes["preprocessing"] = PREPROCESSING[config.preprocessing]
        if changes["preprocessing"].image_size != stored.image_size:
            raise UserError(
                f"config.preprocessing: {config.preprocessing!r} gives inputs of "
                f"{changes['preprocessing'].image_size} pixels, {stored.name} takes "
                f"{stored.image_size}"
            )
    contract = {}
    if config.mask_threshold is not None:
        contract["mask_threshold"] = config.mask_threshold
    if ct_windows:
        contract["ct_windows"] = ct_windows
    preprocessing = changes.get("preprocessing", stored.preprocessing)
    changes["preprocessing"] = dataclasses.replace(preprocessing, **contract)
    return dataclasses.replace(stored, **changes)


def configured(
    stored: SamConfig | UNetConfig, config: ml_collections.ConfigDict
) -> SamConfig | UNetConfig:
    """The checkpoint's model as this run computes it."""
    changes = {"dtype": config.dtype}
    if config.remat:
        if not hasattr(getattr(stored, "encoder", None), "remat"):
            raise UserError(f"config.remat: only a ViT has it, not {stored.name}; leave it False")
        changes["encoder"] = dataclasses.replace(stored.encoder, remat=True)
    return dataclasses.replace(trained_for(stored, config), **changes)


def _check_objects_are_told_apart(
    info: DatasetInfo, model_config: SamConfig | UNetConfig, task: str
) -> None:
    """Refuses slices of several objects for a U-Net that is not shown the box."""
    if not isinstance(model_config, UNetConfig) or model_config.box_channel:
        return
    for split in ("train", "tune"):
        positions, _ = info.objects(split, task)
        several = len(positions) - len(set(positions.tolist()))
        if several:
            raise UserError(
                f"{info.directory}: split {split!r} has {several} further objects in slices that "
                "have one already, and a U-Net without the box channel cannot tell which is "
                "meant; give it the channel, or choose one label with datasets.build --labels or "
                "one task with config.task"
            )


def _stops_early(config: ml_collections.ConfigDict, record: Mapping[str, Any]) -> bool:
    return 0 < config.early_stop_evals <= record["evals_since_best"]
