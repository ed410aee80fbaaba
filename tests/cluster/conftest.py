"""The small model and the data set of the training tests."""

from tests.training.conftest import fields, tiny_checkpoint

__all__ = ["fields", "tiny_checkpoint"]
