"""The loop on real files: what it writes, that it learns, survives a kill, refuses bad input."""

import dataclasses
import json
import os
import subprocess

import numpy as np
import pytest

from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.errors import UserError
from medsam_jax.hub import load_model
from medsam_jax.models.checkpoint import read_metadata, read_params, save_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.sam import SamConfig
from medsam_jax.training.embeddings import fill_cache
from medsam_jax.training.loop import train_and_evaluate
from tests.tiny import tiny_sam
from tests.training.runs import ROOT, command, values


def test_what_a_run_leaves(undisturbed, tiny_checkpoint):
    losses = values(undisturbed, "train/loss")
    assert list(losses) == list(range(1, 9))
    assert np.mean(list(losses.values())[-3:]) < np.mean(list(losses.values())[:3])
    dice = values(undisturbed, "tune/dice")
    assert list(dice) == [0, 4, 8]
    best = read_metadata(undisturbed / "best")
    assert best["training"]["tune"]["tune/dice"] == max(dice.values())
    assert best["licence"] == "Apache-2.0"
    (start,) = json.loads((undisturbed / "run.json").read_text())
    assert start["config"]["matmul_precision"] == "highest"
    shares = start["goodput"]
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0
    for name, share in shares.items():
        assert values(undisturbed, f"speed/share_of_{name}") == {8: share}
    events = list((undisturbed / "tensorboard").iterdir())
    assert any(b"tune/worst_0" in event.read_bytes() for event in events)

    before, after = read_params(tiny_checkpoint), read_params(undisturbed / "last")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert all(name.startswith("mask_decoder.") for name in changed)
    # A bias of the keys adds the same to all logits of a query, so its gradient is zero.
    moved = {name for name in before if name.startswith("mask_decoder.transformer.")}
    assert changed >= {name for name in moved if not name.endswith("k_proj.bias")}
    before, after = load_model(tiny_checkpoint).config, load_model(undisturbed / "last").config
    contract = dataclasses.replace(before.preprocessing, ct_windows=("wide",))  # of the CT slices
    assert after == dataclasses.replace(before, preprocessing=contract)


def test_a_damaged_latest_checkpoint_is_set_aside(config, tmp_path, undisturbed):
    """And the traces of steps that are made again do not stand in the way."""
    config.profile_steps = "6:7"
    train_and_evaluate(config, tmp_path)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    before = values(tmp_path, "train/loss")
    latest = tmp_path / "checkpoints" / "8"
    for file in latest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            os.truncate(file, 100)
    train_and_evaluate(config, tmp_path)
    assert (tmp_path / "checkpoints" / "8.unreadable").is_dir()
    assert values(tmp_path, "train/loss") == before


def test_cached_embeddings_equal_encoding(config, tmp_path, undisturbed):
    with pytest.raises(UserError, match="config.embedding_cache: empty"):
        fill_cache(config)
    config.embedding_cache, config.embedding_dtype = str(tmp_path / "cache"), "float32"
    fill_cache(config)
    filled = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert any("tune" in path.name for path in filled)
    train_and_evaluate(config, tmp_path / "run")
    assert filled == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    for name in ("train/loss", "tune/dice"):
        expected, cached = (values(path, name) for path in (undisturbed, tmp_path / "run"))
        np.testing.assert_allclose(list(cached.values()), list(expected.values()), rtol=1e-5)

    config.embedding_dtype = "bfloat16"
    with pytest.raises(UserError, match="cache: made with another dtype"):
        train_and_evaluate(config, tmp_path / "other")
    config.embedding_dtype, config.matmul_precision = "float32", "default"
    with pytest.raises(UserError, match="cache: made with another matmul precision"):
        train_and_evaluate(config, tmp_path / "other")
    config.frozen = (r"prompt_encoder\..*",)
    with pytest.raises(UserError, match="arrays of the image encoder are trained"):
        train_and_evaluate(config, tmp_path / "third")


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    config.learning_rate, config.clip_norm = 1e30, 0.0
    with pytest.raises(UserError, match=r"is not finite; the batch is in .*nonfinite_batch.npz"):
        train_and_evaluate(config, tmp_path)
    with np.load(tmp_path / "nonfinite_batch.npz") as batch:
        assert batch["image"].shape == (4, 256, 256, 3)


def test_another_configuration_is_refused_by_field(undisturbed, config):
    config.learning_rate = 5e-4
    with pytest.raises(UserError, match=r"config.learning_rate: 0.0005, but .* begun with 0.001"):
        train_and_evaluate(config, undisturbed)
    assert json.loads((undisturbed / "config.json").read_text())["learning_rate"] == 1e-3


def test_a_checkpoint_of_another_recipe_is_refused(config, tmp_path):
    other = dataclasses.replace(
        SamConfig.tiny(), preprocessing=dataclasses.replace(PREPROCESSING["v1"], image_size=64)
    )
    save_model(tmp_path / "v1", flatten_state(tiny_sam(config=other)), other, {})
    config.checkpoint = str(tmp_path / "v1")
    with pytest.raises(UserError, match="built with 'lite'.* is 'v1'"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.learning_rat=1"], "learning_rat"),
        (
            ["--config.batchsize=3"],
            "error: command line: --config.batchsize=3: no field 'batchsize'; did you mean "
            "batch_size?; see --help\n",
        ),
        (["--config.mesh.datta=3"], "--config.mesh.datta=3: no field 'datta'; did you mean data?"),
        (["--config.iou_weight=1"], "--config.iou_weight=1: no field 'iou_weight'; see"),
        (
            ["--config=nowhere.py"],
            "error: command line: 'nowhere.py': no such file; start in the repository's root or "
            "give the whole path\n",
        ),
        (["--config.num_steps=many"], "many"),
        (["--config.data_dir=/nowhere"], "/nowhere: holds no medical_slices data set"),
        (["--config.mesh.data=3", "--config.data_dir=/nowhere"], "config.mesh: data 3 x fsdp 1"),
    ],
)
def test_bad_command_lines_end_in_one_line(arguments, message, tmp_path):
    run = subprocess.run(
        [*command(tmp_path / "run", {}), *arguments],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 1
    assert message in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
