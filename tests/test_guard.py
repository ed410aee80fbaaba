"""Annotations are checked in all packages: a wrong shape, dtype or type is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from datasets.medical_slices.slices import encode_mask
from medsam_jax.ops.convolution import conv3x3
from weights_converter.tensors import LazyTensor


def refused(argument: str):
    return pytest.raises(TypeCheckError, match=f"whilst typechecking parameter '{argument}'")


def test_medsam_jax():
    image, kernel = jnp.zeros((1, 4, 5, 2)), jnp.zeros((3, 3, 2, 6))
    assert conv3x3(image, kernel).shape == (1, 4, 5, 6)
    with refused("kernel"):  # channels that differ
        conv3x3(image, jnp.zeros((3, 3, 3, 6)))
    with refused("x"):
        conv3x3(image[0], kernel)
    with refused("x"):
        conv3x3(image.astype(jnp.int32), kernel)


def test_datasets():
    mask = np.zeros((4, 4), np.uint8)
    assert encode_mask(mask).read().startswith(b"\x89PNG")
    with refused("mask"):
        encode_mask(mask[:2])
    with refused("mask"):
        encode_mask(mask.astype(np.int32))


def test_weights_converter():
    array = np.zeros((2, 3), np.float32)
    assert LazyTensor(array.shape, array.dtype, lambda: array).size == 6
    with refused("shape"):
        LazyTensor((2.0, 3.0), array.dtype, lambda: array)
    with refused("dtype"):
        LazyTensor(array.shape, "float32", lambda: array)


def test_checks_can_be_turned_off_for_a_test(unchecked):
    assert LazyTensor((2, 3), "float32", None).size == 6
