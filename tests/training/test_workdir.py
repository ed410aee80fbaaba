"""Tests of a run's records in its workdir, and of the checks before compilation and writing."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.data.datasets import find_dataset
from medsam_jax.data.manifest import case_hash, case_hashes, short_hash, trained_cases
from medsam_jax.errors import UserError
from medsam_jax.models import checkpoint
from medsam_jax.models.checkpoint import read_config, read_metadata, read_params
from medsam_jax.training.checkpoint import Exporter
from medsam_jax.training.config import base_config
from medsam_jax.training.loop import train_and_evaluate
from medsam_jax.training.sharding import make_mesh
from medsam_jax.training.step import TrainState
from medsam_jax.training.workdir import check_same_run, record_best, record_start
from tests.training.runs import values


def test_each_start_is_recorded(undisturbed, config, built, tmp_path):
    (start,) = json.loads((undisturbed / "run.json").read_text())
    assert start["step"] == 0
    assert start["config"]["num_steps"] == 8
    assert start["versions"]["jax"] == jax.__version__
    assert start["devices"]["count"] == jax.device_count()
    assert start["data_set"]["counts"]["train"]["slices"] > 0
    assert start["command"]

    info = find_dataset(built)
    for step in (0, 6):
        record_start(config, tmp_path, info, step)
    starts = json.loads((tmp_path / "run.json").read_text())
    assert [one["step"] for one in starts] == [0, 6]
    info.record["cases"][0]["slices"] += 1
    record_start(config, tmp_path, info, 6)
    changed = json.loads((tmp_path / "run.json").read_text())[-1]
    assert changed["data_set"]["sha256"] != starts[-1]["data_set"]["sha256"]
    assert starts[-1]["data_set"]["sha256"] == start["data_set"]["sha256"]


@pytest.fixture
def begun(config, built, tmp_path):
    """Records a start of `config` in a workdir; returns the workdir and the data set."""
    info = find_dataset(built)
    record_start(config, tmp_path, info, 0)
    return tmp_path, info


def rewrite(workdir, removed, **fields):
    """Rewrites config.json like an earlier version: without `removed`, with `fields`."""
    path = workdir / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({n: x for n, x in stored.items() if n not in removed} | fields))


def test_a_field_of_a_later_version_counts_as_its_default(begun, config):
    rewrite(begun[0], ("losses", "schedule_args", "multimask"))
    check_same_run(config, *begun)
    config.losses.iou = 1.0
    with pytest.raises(UserError, match="config.losses: .*1.0.*, but .* begun with .*'iou': 0.0"):
        check_same_run(config, *begun)


def test_a_run_under_the_earlier_names_of_fields_is_resumed(begun, config):
    weights = {"dice_weight": 0.5, "cross_entropy_weight": 1.0, "iou_weight": 2.0}
    rewrite(begun[0], ("losses", "optimizer_args"), beta1=0.9, beta2=0.99, **weights)
    config.losses.update({"dice": 0.5, "iou": 2.0})
    config.optimizer_args = {"b1": 0.9, "b2": 0.99}
    check_same_run(config, *begun)
    config.losses.dice = 1.0
    with pytest.raises(UserError, match="config.losses: "):
        check_same_run(config, *begun)


def test_another_data_set_is_refused_a_moved_one_is_not(begun, config):
    workdir, info = begun
    config.data_dir = "moved"
    check_same_run(config, workdir, dataclasses.replace(info, directory=info.directory / "moved"))
    record = info.record | {"cases": info.record["cases"][1:]}
    other = dataclasses.replace(info, record=record)
    hashes = (other.fingerprint[:12], info.fingerprint[:12])
    with pytest.raises(UserError) as caught:
        check_same_run(config, workdir, other)
    assert all(one in str(caught.value) for one in (*hashes, str(info.directory)))
    assert "\n" not in str(caught.value)


def test_a_cache_may_come_and_go_while_embeddings_keep_their_type(begun, config):
    config.embedding_cache, config.embedding_dtype = "cache", "float32"
    check_same_run(config, *begun)
    config.embedding_dtype = "bfloat16"
    with pytest.raises(UserError, match="would get bfloat16 embeddings, but .* float32 ones; use"):
        check_same_run(config, *begun)
    record_start(config, *begun, step=4)
    config.embedding_cache = ""
    with pytest.raises(UserError, match="would get float32 embeddings, but .* bfloat16 ones"):
        check_same_run(config, *begun)
    config.dtype = "bfloat16"
    record_start(config, *begun, step=6)
    config.embedding_cache = "cache"
    check_same_run(config, *begun)


def test_a_checkpoint_knows_the_cases_it_was_trained_on(undisturbed, built):
    seen = trained_cases(read_metadata(undisturbed / "best"))
    record = find_dataset(built).record
    cases = {one["case_id"]: one["split"] for one in record["cases"]}
    expected = {case_hash("medical_slices", name): split for name, split in cases.items()}
    assert {one: split for one, split in expected.items() if split != "validation"} == seen
    assert set(seen.values()) == {"train", "tune"}
    (start,) = json.loads((undisturbed / "run.json").read_text())
    assert start["data_set"]["cases"] == case_hashes(record)
    assert case_hashes(record, "organs")["train"] != case_hashes(record)["train"]
    assert trained_cases({"licence": "Apache-2.0"}) == {}
    images = trained_cases(read_metadata(undisturbed / "best"), "images")
    scans = {short_hash(one["image_sha256"]): one["split"] for one in record["cases"]}
    assert images == {one: split for one, split in scans.items() if split != "validation"}


def test_the_end_of_a_run_names_the_best_step_and_its_scores(undisturbed):
    (start,) = json.loads((undisturbed / "run.json").read_text())
    dice = values(undisturbed, "tune/dice")
    step = max(dice, key=dice.get)
    assert start["best"] == {
        "step": step,
        "score": dice[step],
        "parts": {"tune/dice": dice[step]},
        "no_better_than_the_start": step == 0,
    }


def test_a_best_model_that_is_untrained_is_called_so(begun, config):
    workdir, _ = begun
    parts = {"tune/dice": 0.75, "tune/point_dice": 0.25}
    best = {"step": 0, "score": 0.5, "parts": parts}
    assert record_best(workdir, {"best_score": 0.5, "best": best}) == (
        "best tune score 0.5000 (mean of tune/dice 0.7500 and tune/point_dice 0.2500) at step 0: "
        "no better than the start, the model is untrained"
    )
    (start,) = json.loads((workdir / "run.json").read_text())
    assert start["best"]["no_better_than_the_start"]
    trained = {"step": 4, "score": 0.75, "parts": {"tune/dice": 0.75}}
    line = record_best(workdir, {"best_score": 0.75, "best": trained})
    assert line == "best tune score 0.7500 (tune/dice 0.7500) at step 4"
    assert record_best(workdir, {"best_score": 0.75}) == "best tune score 0.7500"


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    config = base_config()
    with pytest.raises(UserError, match="batch_size / accumulation_steps: 8 is not a multiple"):
        make_mesh(config)
    config.batch_size = 9
    with pytest.raises(UserError, match="config.eval_batch_size: 8 is not a multiple of the 3"):
        make_mesh(config)


def test_a_split_that_is_missing_or_empty_is_refused(config, built, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(built, data)
    config.data_dir = str(data)
    directory = find_dataset(data).directory
    np.savez(directory / "objects-tune.npz", position=np.zeros(0, int), label=np.zeros(0, int))
    with pytest.raises(UserError, match="split 'tune' holds no object"):
        train_and_evaluate(config, tmp_path / "run")

    record = json.loads((directory / "medical_slices.json").read_text())
    record["splits"]["tune"]["slices"] = 0
    (directory / "medical_slices.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="split 'tune' has no slices; it has train, validation"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_export_to_a_full_disk_leaves_the_one_before(tiny_checkpoint, tmp_path, monkeypatch):
    arrays = {name: jnp.asarray(x) for name, x in read_params(tiny_checkpoint).items()}
    export = Exporter(read_config(tiny_checkpoint), base_config(), tiny_checkpoint, {})
    best = tmp_path / "best"
    export(best, TrainState(jnp.int32(0), arrays, None, {}), 1, {})

    write = checkpoint._write_params

    def write_until_full(directory, params):
        write(directory, params)
        raise ValueError("RESOURCE_EXHAUSTED: write: No space left on device")

    monkeypatch.setattr(checkpoint, "_write_params", write_until_full)
    other = {name: value + 1 for name, value in arrays.items()}
    with pytest.raises(UserError, match="best: the disk is full; free some space"):
        export(best, TrainState(jnp.int32(0), other, None, {}), 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    after = read_params(best)
    assert all(np.array_equal(after[name], value) for name, value in arrays.items())
