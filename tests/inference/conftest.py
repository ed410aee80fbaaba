"""One small model for the inference tests, compiled once."""

import numpy as np
import pytest
from flax import nnx

from medsam_jax.inference.predict_file import FilePredictor
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.volume import VolumePredictor
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.sam import Sam, SamConfig
from medsam_jax.models.unet import UNet, UNetConfig
from tests.tiny import update_state


def random_values(model: Sam | UNet) -> dict[str, np.ndarray]:
    """Drawn by NumPy: flax's initialisers take longer to compile than the tests to run."""
    rng = np.random.default_rng(0)
    values = {}
    for path, variable in flatten_state(model).items():
        leaf = path.rsplit(".", 1)[-1]
        if leaf in ("scale", "var"):
            value = np.ones(variable.shape)
        elif leaf == "positional_encoding_gaussian_matrix":
            value = rng.standard_normal(variable.shape)
        else:
            value = rng.normal(0, 0.2, variable.shape)
        values[path] = value.astype(np.float32)
    return values


@pytest.fixture(scope="session")
def model():
    model = nnx.eval_shape(lambda: Sam(SamConfig.tiny(), rngs=nnx.Rngs(0)))
    update_state(model, random_values(model))
    return model


@pytest.fixture(scope="session")
def unet():
    model = nnx.eval_shape(lambda: UNet(UNetConfig.tiny(), rngs=nnx.Rngs(0)))
    update_state(model, random_values(model))
    return model


@pytest.fixture(scope="session")
def compiled_predictor(model):
    return Predictor(model)


@pytest.fixture
def predictor(compiled_predictor):
    """Without an image; shares what earlier tests compiled."""
    return Predictor.of(compiled_predictor)


@pytest.fixture
def bright(monkeypatch, compiled_predictor):
    """Files are answered, without a model's arithmetic, by the bright pixels in the box."""

    def predict(self, index, prompt):
        x0, y0, x1, y1 = np.asarray(prompt["box"]).astype(int)
        mask = np.zeros(self.slices.shape[1:3], bool)
        window = slice(y0, y1 + 1), slice(x0, x1 + 1)
        mask[window] = self.slices[index][window] > 127
        return mask, 0.9

    monkeypatch.setattr(VolumePredictor, "_predict", predict)
    monkeypatch.setattr(FilePredictor, "_predictor", compiled_predictor)
