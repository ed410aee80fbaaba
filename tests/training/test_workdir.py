"""What is refused before anything is compiled or written, and what a workdir tells of its run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.data.datasets import find_dataset
from medsam_jax.errors import UserError
from medsam_jax.models import checkpoint
from medsam_jax.models.checkpoint import read_config, read_params
from medsam_jax.training.config import base_config
from medsam_jax.training.export import Exporter
from medsam_jax.training.loop import train_and_evaluate
from medsam_jax.training.sharding import make_mesh
from medsam_jax.training.step import TrainState
from medsam_jax.training.workdir import record_start


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


def test_a_field_of_a_later_version_counts_as_its_default(undisturbed, config):
    from medsam_jax.training.workdir import check_same_run

    path = undisturbed / "config.json"
    whole = path.read_text()
    fields = json.loads(whole)
    del fields["iou_weight"]
    try:
        path.write_text(json.dumps(fields))
        check_same_run(config, undisturbed)
        config.iou_weight = 1.0
        with pytest.raises(UserError, match="config.iou_weight: 1.0, but .* begun with 0.0"):
            check_same_run(config, undisturbed)
    finally:
        path.write_text(whole)


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
    export = Exporter(read_config(tiny_checkpoint), base_config(), tiny_checkpoint)
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
