"""Run lengths by rows and by columns: cases worked out by hand, and reading back."""

import numpy as np
import pytest

from medsam_jax.data.run_lengths import (
    compress_rle,
    decode_rle,
    decode_runs,
    encode_rle,
    encode_runs,
)


@pytest.mark.parametrize("fill", [0, 1, 2])
def test_runs_read_back(fill):
    mask = np.random.default_rng(0).integers(0, 2, (7, 9)) if fill == 2 else np.full((7, 9), fill)
    np.testing.assert_array_equal(decode_runs(encode_runs(mask == 1), (7, 9)), mask == 1)


def test_runs_go_along_the_rows_and_begin_with_background():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert encode_runs(mask) == [1, 2, 2, 1]
    assert encode_runs(~mask) == [0, 1, 2, 2, 1]
    assert encode_runs(np.zeros((0, 3), bool)) == []


def test_run_lengths_go_down_the_columns_from_background():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert encode_rle(mask) == {"size": [2, 3], "counts": [2, 1, 1, 2]}
    assert encode_rle(~mask)["counts"] == [0, 2, 1, 1, 2]
    assert encode_rle(np.zeros((2, 3), bool))["counts"] == [6]
    assert encode_rle(np.ones((2, 3), bool))["counts"] == [0, 6]


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_there_and_back(seed):
    mask = np.random.default_rng(seed).random((17, 1 + 9 * seed)) < 0.4
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        # As pycocotools encodes them: 5 bits a digit from the lowest, bit 5 says "more", plus 48;
        # from the fourth count on the difference from the one before last.
        ([6], "6"),
        ([2, 1, 1, 2], "2111"),
        ([100, 3, 50, 1, 20], "T33b1NRO"),
    ],
)
def test_compressed_run_lengths(counts, text):
    assert compress_rle({"size": [1, sum(counts)], "counts": counts})["counts"] == text
