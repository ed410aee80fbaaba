"""A tiny model with random weights, and configurations that train it on the hospital's slices."""

import pathlib

import ml_collections
import pytest

from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.training.config import base_config
from tests.tiny import tiny_sam
from tests.training.runs import train


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("weights") / "tiny"
    model = tiny_sam()
    save_model(directory, flatten_state(model), model.config, {"licence": "Apache-2.0"})
    return directory


@pytest.fixture(scope="session")
def fields(tiny_checkpoint, built) -> dict:
    """Eight steps on the tiny model, everything logged; of `base_config`, what differs."""
    return {
        "checkpoint": str(tiny_checkpoint),
        "data_dir": str(built),
        "batch_size": 4,
        "eval_batch_size": 8,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "num_steps": 8,
        "eval_every": 4,
        "checkpoint_every": 2,
        "log_every": 1,
        "eval_overlays": 2,
        "report": False,
    }


@pytest.fixture
def config(fields) -> ml_collections.ConfigDict:
    config = base_config()
    config.update(fields)
    return config


@pytest.fixture(scope="session")
def undisturbed(fields, tmp_path_factory) -> pathlib.Path:
    """A run of eight steps that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(workdir, fields)
    return workdir
