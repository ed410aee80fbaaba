"""Reading files that PyTorch wrote (tests/golden/pth), and reading back what we write."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from medsam_jax.errors import UserError
from weights_converter.pth_reader import read_pth
from weights_converter.pth_writer import write_pth

GOLDEN = Path(__file__).parents[1] / "golden" / "pth"
RAMP = np.arange(24, dtype=np.float32) / np.float32(7)
# The formulas of tests/golden/make_pth.py.
EXPECTED = {
    "f32": RAMP.reshape(2, 3, 4),
    "f16": RAMP.astype(np.float16),
    "bf16": RAMP.astype(ml_dtypes.bfloat16),
    "f64": RAMP.astype(np.float64) / 3,
    "i64": np.array(2**40 + 1),
    "i32": np.arange(-3, 3, dtype=np.int32),
    "u8": np.arange(250, 256, dtype=np.uint8),
    "flag": np.array([True, False, True]),
    "transposed": RAMP.reshape(4, 6).T,
    "tail": RAMP[20:],
}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("zip.pth", "pth"),
        ("protocol4.pth", "pth"),
        ("no_checksums.pth", "pth"),
        ("legacy.pth", "pth (legacy)"),
    ],
)
def test_reads_what_pytorch_writes(name, format, assert_same):
    file = read_pth(str(GOLDEN / name))
    assert (file.format, file.wrapper, file.prefix) == (format, "", "")
    assert_same(file.tensors, EXPECTED)


@pytest.mark.parametrize("name", ["training.pth", "training_legacy.pth"])
def test_takes_the_model_out_of_a_training_checkpoint(name):
    file = read_pth(str(GOLDEN / name))
    assert (file.wrapper, file.prefix) == ("model", "module.")
    assert list(file.tensors) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    np.testing.assert_array_equal(
        file.tensors["0.weight"].read(),
        np.arange(6, dtype=np.float32).reshape(2, 3) / np.float32(5),
    )
    assert file.tensors["1.num_batches_tracked"].read() == 1


def test_reads_parameters_under_state_dict():
    file = read_pth(str(GOLDEN / "parameter.pth"))
    assert file.wrapper == "state_dict"
    np.testing.assert_array_equal(file.tensors["a"].read(), np.ones(2, np.float32))


def test_refuses_torchscript():
    with pytest.raises(UserError, match="TorchScript"):
        read_pth(str(GOLDEN / "torchscript.pt"))


def test_what_is_written_reads_back_to_the_bit(tmp_path, lazily, assert_same):
    path = str(tmp_path / "out.pth")
    write_pth(path, lazily(EXPECTED))
    assert_same(read_pth(path).tensors, EXPECTED)


def test_written_bytes_depend_on_the_tensors_only(tmp_path, lazily):
    for name in ("a.pth", "b.pth"):
        write_pth(str(tmp_path / name), lazily(EXPECTED))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_tensors_are_views_of_the_file_and_cannot_be_written():
    array = read_pth(str(GOLDEN / "zip.pth")).tensors["f32"].read()
    assert not array.flags.owndata
    assert not array.flags.writeable
