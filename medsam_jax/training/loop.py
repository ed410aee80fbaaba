"""Training with evaluation and exact resume: `train_and_evaluate`.

A start does the following, in this order. It checks the configuration, opens and checks data and
checkpoint, and compares configuration and data with those of the workdir. It makes the state from
the checkpoint's weights. The latest readable training checkpoint, if any, replaces state, data
position and best score, and the log is cut back to its step. From there a resumed run repeats an
undisturbed one, bit for bit on the same devices.
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from medsam_jax.cli import progress
from medsam_jax.data.input_pipeline import train_loader
from medsam_jax.data.manifest import training_record
from medsam_jax.data.preprocess import check_compatible
from medsam_jax.hub import resolve
from medsam_jax.io.files import check_writable
from medsam_jax.models.checkpoint import read_config, read_params
from medsam_jax.training.checkpoint import Exporter, TrainCheckpoints
from medsam_jax.training.config import augmentation_of, profile_steps, validate
from medsam_jax.training.embeddings import cached_embeddings
from medsam_jax.training.feeding import DeviceBatches
from medsam_jax.training.monitor import (
    FiniteWatch,
    Goodput,
    MetricWriter,
    StepClock,
    StepTrace,
    termination,
)
from medsam_jax.training.optimizer import parameter_table
from medsam_jax.training.setup import (
    check_one_object_a_slice,
    configured,
    open_splits,
    set_up,
    trained_for,
)
from medsam_jax.training.sharding import make_mesh
from medsam_jax.training.validation import TuneEvaluation
from medsam_jax.training.workdir import check_same_run, record_best, record_end, record_start

log = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains by `config` in `workdir`; the same call again resumes.

    Writes `config.json`, `run.json` (a record of each start), `metrics.csv`, `tensorboard/`,
    `checkpoints/` (training states) and the model directories `best/` (by `TuneResult.score`) and
    `last/`, which `load_model` reads. Returns the scalars of the last evaluation.

    Raises:
      UserError: bad configuration or data, a full disk, or a loss that is not finite.
      SystemExit: 143 after SIGTERM, once the state is saved.
    """
    # --- Check everything before the long work.
    goodput = Goodput()
    workdir = Path(workdir)
    validate(config)
    check_writable(workdir)
    mesh = make_mesh(config)
    info = open_splits(config)
    origin = resolve(config.checkpoint)
    stored_config = read_config(origin)
    model_config = configured(stored_config, config)
    check_compatible(info, model_config.preprocessing)
    check_one_object_a_slice(info, model_config, config.task)
    check_same_run(config, workdir, info)

    # --- Model, steps and data.
    log.info("loading %s", origin)
    run = set_up(config, stored_config, mesh, read_params(origin))
    state = run.first_state()
    log.info("parameters\n%s", parameter_table(state.arrays, run.labels, state.opt_state))
    embeddings = cached_embeddings(config, run.functional, run.labels, model_config, info)
    evaluate = TuneEvaluation(config, info, run.eval_step, run.by_item, embeddings["tune"])
    loader = train_loader(
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
        fold=config.fold,
    )
    data = DeviceBatches(loader, run.by_item)

    # --- State of an earlier start, if any.
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
        exported_config = trained_for(stored_config, config, info.ct_windows("train", config.task))
        seen = training_record(info.record, config.task)
        export = Exporter(exported_config, config, origin, seen)

        def score(step: int) -> None:
            result = evaluate(state.evaluated())
            writer.write_scalars(step, result.scalars)
            writer.write_images(step, result.overlays)
            better = result.score > record["best_score"]
            record["evals_since_best"] = 0 if better else record["evals_since_best"] + 1
            record["tune"] = result.scalars
            if better:
                record["best_score"] = result.score
                record["best"] = {"step": step, "score": result.score, "parts": result.parts}
                export(workdir / "best", state, step, result.scalars)

        def report(step: int) -> None:
            shares = goodput.shares()
            log.info("%s", goodput.line())
            writer.write_scalars(step, {f"speed/share_of_{n}": x for n, x in shares.items()})
            record_end(workdir, {"goodput": shares})

        # --- Train.
        if not restored:
            with goodput.of("evaluation"):
                score(0)
        watch, clock = FiniteWatch(workdir), StepClock(config.batch_size)
        trace = StepTrace(profile_steps(config), workdir / "profile")
        stack.callback(trace.close)
        stop_after = stack.enter_context(termination())
        program = None
        last_step = step if _stops_early(config, record) else config.num_steps
        steps = range(step + 1, last_step + 1)
        for step in progress(steps, "training") if jax.process_index() == 0 else steps:
            host_batch, batch = data.take()
            if program is None:
                log.info("compiling the training step")
                with clock.paused():
                    program = run.train_step.lower(state, batch).compile()
                clock.measure(program, config.accumulation_steps)
                goodput.started()
            trace.begin(step, state)
            state, scalars = program(state, batch)
            last = step == config.num_steps
            with clock.waiting(), goodput.of("data"):
                if not last:  # the next step's batch, while the devices work on this step
                    data.load()
            trace.end(step, state)
            watch.add(step, scalars, host_batch)
            terminated = stop_after(step)
            if step % config.log_every == 0 or last:
                watch.check()
                named = {f"train/{name}": float(value) for name, value in scalars.items()}
                writer.write_scalars(step, named | clock.scalars())
            if step % config.eval_every == 0 or last:
                watch.check()
                with clock.paused(), goodput.of("evaluation"):
                    score(step)
            if step % config.checkpoint_every == 0 or last or terminated:
                watch.check()
                with goodput.of("checkpoints"):
                    checkpoints.save(step, state, data, dict(record))
            if terminated:
                report(step)
                log.warning("SIGTERM: saved at step %d; the same command resumes there", step)
                raise SystemExit(143)
            if _stops_early(config, record):
                break

        # --- Save the last state.
        with goodput.of("checkpoints"):
            checkpoints.save(step, state, data, dict(record))
            export(workdir / "last", state, step, record["tune"])
        if program is not None:
            report(step)
    log.info("%s; %s holds that model", record_best(workdir, record), workdir / "best")
    return record["tune"]


def _stops_early(config: ml_collections.ConfigDict, record: Mapping[str, Any]) -> bool:
    return 0 < config.early_stop_evals <= record["evals_since_best"]
