"""Twenty steps from cached embeddings give the losses of twenty steps with the encoder."""

import numpy as np
import pytest

from medsam_jax.data.datasets import open_dataset
from medsam_jax.data.input_pipeline import train_loader
from medsam_jax.models.checkpoint import read_config, read_params
from medsam_jax.training.config import base_config
from medsam_jax.training.embeddings import cached_embeddings
from medsam_jax.training.setup import set_up
from medsam_jax.training.sharding import make_mesh, model_inputs


def twenty_losses(config) -> np.ndarray:
    model_config = read_config(config.checkpoint)
    run = set_up(config, model_config, make_mesh(config), read_params(config.checkpoint))
    state = run.first_state()
    _, info = open_dataset(config.data_dir, "train")
    embeddings = cached_embeddings(config, run.functional, run.labels, model_config, info)["train"]
    data = train_loader(
        config.data_dir,
        "train",
        batch_size=config.batch_size,
        seed=config.seed,
        box_jitter=config.box_jitter,
        embeddings=embeddings,
    )
    losses = []
    for _ in range(20):
        state, scalars = run.train_step(state, model_inputs(next(data)))
        losses.append(scalars["loss"])
    return np.array(losses)


@pytest.fixture(scope="module")
def make_config(tiny_checkpoint, built):
    def make(**fields):
        config = base_config()
        given = {"checkpoint": str(tiny_checkpoint), "data_dir": str(built), "batch_size": 4}
        config.update(given | {"learning_rate": 1e-3} | fields)
        return config

    return make


@pytest.fixture(scope="module")
def encoded(make_config) -> np.ndarray:
    return twenty_losses(make_config())


# bfloat16 keeps 8 bits of an embedding, a relative error of up to 0.004 in each number of it.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_twenty_cached_steps_equal_twenty_encoded(make_config, encoded, tmp_path, dtype, tolerance):
    config = make_config(embedding_cache=str(tmp_path / "cache"), embedding_dtype=dtype)
    cached = twenty_losses(config)
    assert encoded[-5:].mean() < 0.9 * encoded[:5].mean(), "it learns, so that there is a course"
    np.testing.assert_allclose(cached, encoded, rtol=tolerance)
