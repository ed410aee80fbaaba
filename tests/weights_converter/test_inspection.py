"""`--inspect`: what is printed of a file, a directory and a stranger."""

import subprocess
import sys

import numpy as np

from tests.weights_converter import pickles
from weights_converter.convert import convert
from weights_converter.inspection import inspect
from weights_converter.pth_writer import write_pth


def _lines(text: str) -> dict[str, str]:
    return {title.strip(): value.strip() for title, _, value in map(_split, text.splitlines())}


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def test_file(tmp_path, tiny_arrays, lazily):
    path = tmp_path / "a.pth"
    write_pth(str(path), lazily({f"module.{name}": v for name, v in tiny_arrays.items()}))
    lines = _lines(inspect(str(path)))
    floats = sum(array.dtype == np.float32 for array in tiny_arrays.values())
    expected = {
        "format": "pth",
        "wrapper": "none",
        "prefix": "module.",
        "naming": "segment_anything",
        "known as": "no known file",
        "licence": "unknown",
        "architecture": "tiny, input 64 x 64",
        "preprocessing": "recipe lite, min_max, CT in wide",
        "tensors": f"{len(tiny_arrays)} ({floats} F32, {len(tiny_arrays) - floats} I64)",
        "elements": f"{sum(array.size for array in tiny_arrays.values()):,}",
    }
    assert {title: lines[title] for title in expected} == expected
    decoder = [v.size for name, v in tiny_arrays.items() if name.startswith("mask_decoder.")]
    assert lines["mask_decoder"] == f"{sum(decoder):,}"


def test_file_of_another_model_is_described_too(tmp_path):
    program = pickles.dictionary(fc=pickles.tensor())
    four = {"data/0": np.arange(4, dtype=np.float32).tobytes()}
    (tmp_path / "a.pth").write_bytes(pickles.archive(program, four))
    lines = _lines(inspect(str(tmp_path / "a.pth")))
    assert (lines["naming"], lines["tensors"]) == ("none of ours", "1 (1 F32)")
    assert lines["fits"].startswith("no: ")


def test_command_line_converts_and_inspects_a_directory(tmp_path, tiny_arrays, lazily):
    write_pth(str(tmp_path / "a.pth"), lazily(tiny_arrays))
    convert(str(tmp_path / "a.pth"), str(tmp_path / "directory"))
    command = [sys.executable, "-m", "weights_converter.convert", "--input"]
    done = subprocess.run(
        [*command, str(tmp_path / "directory"), "--inspect"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = _lines(done.stdout)
    assert lines["format"] == "orbax"
    assert lines["made from"] == "a.pth, as converted"
    assert lines["architecture"] == "tiny, input 64 x 64"
    assert done.stderr == ""
