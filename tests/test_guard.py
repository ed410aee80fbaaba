"""Annotations are checked in all packages: a wrong shape, dtype or type is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from datasets.medical_slices.slices import encode_mask
from medsam_jax.io.tensors import LazyTensor
from medsam_jax.ops.convolution import conv3x3
from medsam_jax.ops.form import PLAIN
from weights_converter.architectures import detect


def refused(argument: str):
    return pytest.raises(TypeCheckError, match=f"whilst typechecking parameter '{argument}'")


def test_medsam_jax():
    image, kernel = jnp.zeros((1, 4, 5, 2)), jnp.zeros((3, 3, 2, 6))
    assert conv3x3(image, kernel, PLAIN).shape == (1, 4, 5, 6)
    with refused("kernel"):  # channels that differ
        conv3x3(image, jnp.zeros((3, 3, 3, 6)), PLAIN)
    with refused("x"):
        conv3x3(image[0], kernel, PLAIN)
    with refused("x"):
        conv3x3(image.astype(jnp.int32), kernel, PLAIN)


def test_datasets():
    mask = np.zeros((4, 4), np.uint8)
    assert encode_mask(mask).read().startswith(b"\x89PNG")
    with refused("mask"):
        encode_mask(mask[:2])
    with refused("mask"):
        encode_mask(mask.astype(np.int32))


def test_weights_converter():
    name = "image_encoder.patch_embed.proj.weight"
    tensors = {name: LazyTensor.of(np.zeros((768, 3, 16, 16), np.float32))}
    assert detect(tensors, "a.pth") == "vit_b"
    with refused("tensors"):
        detect({name: np.zeros(3, np.float32)}, "a.pth")
    with refused("path"):
        detect(tensors, 3)


def test_checks_can_be_turned_off_for_a_test(unchecked):
    assert LazyTensor((2, 3), "float32", None).size == 6
