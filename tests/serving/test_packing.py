"""Packed arrays: both ways with the client's own, and damaged ones."""

import os
import struct

import blosc2
import numpy as np
import pytest
from nnInteractive.inference.remote.serialization import pack_array, unpack_array

from medsam_jax.errors import UserError
from medsam_jax.serving import packing

MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", 10_000))
TYPES = ["bool", "uint8", "int16", "uint16", "int32", "float16", "float32", "float64", "uint64"]


def array_of(dtype):
    return np.random.default_rng(0).integers(0, 2, (1, 5, 7, 9)).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_client_reads_ours_and_we_read_the_clients(dtype):
    array = array_of(dtype)
    for codec in (blosc2.Codec.ZSTD, blosc2.Codec.LZ4):
        read = packing.unpack(pack_array(array, codec=codec), array.nbytes)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
    np.testing.assert_array_equal(unpack_array(packing.pack(array)), array)
    np.testing.assert_array_equal(
        unpack_array(packing.pack(array[0, :, ::2, 1:8])), array[0, :, ::2, 1:8]
    )


def test_zeros_of_any_length():
    for length in (1, 31, 707_658):
        zeros = np.zeros(length, np.uint8)
        np.testing.assert_array_equal(packing.unpack(packing.pack(zeros), length), zeros)
        np.testing.assert_array_equal(unpack_array(packing.pack(zeros)), zeros)


def test_several_chunks(monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 64)
    array = array_of("int16")
    body = packing.pack(array)
    np.testing.assert_array_equal(packing.unpack(body, array.nbytes), array)
    np.testing.assert_array_equal(unpack_array(body), array)


def test_the_limit_is_exact():
    array = array_of("int16")
    body = packing.pack(array)
    packing.unpack(body, array.nbytes)
    with pytest.raises(packing.TooLargeError, match="630 bytes; the limit is 629"):
        packing.unpack(body, array.nbytes - 1)


def test_a_shape_whose_product_passes_64_bits():
    shape = struct.pack("<4q", *[1 << 40] * 4)
    with pytest.raises(packing.TooLargeError):
        packing.unpack(b"NNIA" + bytes([1, 1, 4, 5]) + b"uint8" + shape + bytes(4), 1 << 30)


def test_a_type_that_holds_objects():
    body = packing.pack(np.zeros(3, np.uint8)).replace(b"\x05uint8", b"\x06object")
    with pytest.raises(UserError, match="type: 'object'"):
        packing.unpack(body, 1 << 20)


def test_damaged_arrays_are_refused_or_read_whole():
    """A mutation may hit values, which nothing protects; every other one is a UserError."""
    rng = np.random.default_rng(0)
    bodies = [pack_array(array_of(dtype)) for dtype in ("uint8", "int16", "float32")]
    refused = 0
    for _ in range(MUTATIONS):
        body = bytearray(bodies[rng.integers(len(bodies))])
        if rng.random() < 0.2:
            body = body[: rng.integers(len(body))]
        for _ in range(rng.integers(1, 4)):
            if body:
                # Heads and lengths are hit as often as all the rest.
                reach = len(body) if rng.random() < 0.5 else min(len(body), 100)
                body[rng.integers(reach)] = rng.integers(256)
        try:
            read = packing.unpack(bytes(body), 1 << 20)
        except UserError as error:
            refused += "\n" not in str(error)
        else:
            assert 0 < read.nbytes <= 1 << 20
    assert refused > MUTATIONS / 2
