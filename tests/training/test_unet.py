"""The U-Net in the training loop: one task, and no box where objects must be told apart."""

import dataclasses

import pytest

from medsam_jax.data.datasets import find_dataset
from medsam_jax.errors import UserError
from medsam_jax.models.sam import SamConfig
from medsam_jax.models.unet import UNetConfig
from medsam_jax.training.setup import check_one_object_a_slice


def test_without_the_box_a_slice_has_one_object(built):
    info = find_dataset(built)
    without_box = dataclasses.replace(UNetConfig.tiny(), box_channel=False)
    with pytest.raises(UserError, match="split 'train' has .* further objects in slices"):
        check_one_object_a_slice(info, without_box, "")
    for config in (UNetConfig.tiny(), SamConfig.tiny()):
        check_one_object_a_slice(info, config, "")


def test_a_task_with_one_label_needs_no_box(built, monkeypatch):
    info = find_dataset(built)
    without_box = dataclasses.replace(UNetConfig.tiny(), box_channel=False)
    objects = type(info).objects
    # The hospital's tumours are all in train.
    monkeypatch.setattr(type(info), "objects", lambda self, _, task: objects(self, "train", task))
    check_one_object_a_slice(info, without_box, "tumour")
