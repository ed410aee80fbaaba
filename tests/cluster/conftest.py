"""The small model and the data set of the training tests; the model of the inference tests."""

from tests.inference.conftest import model
from tests.training.conftest import fields, tiny_checkpoint, undisturbed

__all__ = ["fields", "model", "tiny_checkpoint", "undisturbed"]
