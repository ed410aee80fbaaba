"""Broken and malicious files: one clear message each, nothing run, nothing left behind."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from medsam_jax.errors import UserError
from tests.weights_converter import pickles
from weights_converter.convert import convert
from weights_converter.pth_reader import read_pth
from weights_converter.readers import read_file

FOUR = {"data/0": np.arange(4, dtype=np.float32).tobytes()}


class _Command:
    """Pickles into a call, the way every pickle exploit does."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _exploit(path, protocol: int) -> bytes:
    """A pickle that creates `path` when Python's own unpickler reads it."""
    return pickle.dumps({"model": _Command(open, str(path), "w")}, protocol=protocol)


def _zipped(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [_zipped, bytes], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path, protocol, wrap):
    trace = tmp_path / "trace"
    exploit = _exploit(trace, protocol)
    pickle.loads(exploit)["model"].close()
    assert trace.exists(), "the exploit works on an unsafe reader, so the test means something"
    trace.unlink()
    path = tmp_path / "evil.pth"
    path.write_bytes(wrap(exploit))
    with pytest.raises(UserError, match=r"refused|pickle|not a PyTorch file|text file"):
        read_pth(str(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n" + pickles.text("true") + b"\x85R",
        b"\x8c\x02os\x8c\x06system\x93" + pickles.text("true") + b"\x85R",
        b"cbuiltins\neval\n" + pickles.text("1") + b"\x85R",
        b"ctorch.hub\nload\n" + pickles.text("x") + b"\x85R",
        b"cnumpy\nload\n" + pickles.text("x") + b"\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
        b"ccollections\nOrderedDict.__init__\n",
        b"c__torch__.net\nModel\n)\x81",
    ],
)
def test_every_name_that_is_no_tensor_is_refused(tmp_path, program):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickles.archive(pickles.dictionary(a=program)))
    with pytest.raises(UserError, match=r"refused, nothing was run|TorchScript"):
        read_pth(str(path))


def _truncated(path, tiny_pth):
    path.write_bytes(tiny_pth[: len(tiny_pth) // 2])


def _flipped_value(path, tiny_pth):
    damaged = bytearray(tiny_pth)
    damaged[len(damaged) // 2] ^= 1  # most of the file is tensor data
    path.write_bytes(bytes(damaged))


def _write(content: bytes):
    return lambda path, tiny_pth: path.write_bytes(content)


def _one(**arguments):
    return pickles.archive(pickles.dictionary(a=pickles.tensor(**arguments)), FOUR)


_BOMB = b"N" + b"q\x00h\x00\x86" * 60  # hashing it would take 2**60 steps
_HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2**29], "data_offsets": [0, 2**31]}}).encode()

CORPUS = {
    "empty": (_write(b""), "the file is empty"),
    "text": (_write(b"<html>404 not found</html>\n"), "a text file"),
    "lfs": (_write(b"version https://git-lfs.github.com/spec/v1\noid x\n"), "git lfs pull"),
    "noise": (_write(bytes(range(1, 256)) * 4), "not a PyTorch file"),
    "truncated zip": (_truncated, "truncated or damaged"),
    "changed value": (_flipped_value, r"damaged \(checksum\)"),
    "zip of something else": (
        _write(_zipped(b"").replace(b"data.pkl", b"data.txt")),
        "no data.pkl",
    ),
    "empty pickle": (_write(_zipped(b"")), "breaks off"),
    "2 GB claim in 1 KB": (_write(_one(size=2**29, shape=(2**29,))), "claims 2147483648 bytes"),
    "view beyond its storage": (_write(_one(shape=(5,))), "claims 5 elements"),
    "offset beyond its storage": (_write(_one(offset=2**61, shape=(1,))), "its storage has 4"),
    "endless view of one element": (
        _write(_one(shape=(2**40,), strides=(0,))),
        "its storage has 4",
    ),
    "negative stride": (_write(_one(strides=(-1,))), "impossible shape"),
    "missing storage": (_write(_one(key="7")), "is missing"),
    "storage outside the archive": (_write(_one(key="../../etc/passwd")), "is missing"),
    "unknown element type": (_write(_one(storage="QInt8Storage")), "refused"),
    "compressed": (
        _write(pickles.archive(pickles.dictionary(a=pickles.tensor()), FOUR, compress=True)),
        "compressed",
    ),
    "hash bomb": (_write(pickles.archive(b"}" + _BOMB + b"Ns")), "unusual keys"),
    "list as key": (_write(pickles.archive(b"}]Ns")), "unusual keys"),
    "dictionary within itself": (
        _write(pickles.archive(b"}q\x00" + pickles.text("model") + b"h\x00s")),
        "not a plain dictionary",
    ),
    "nested wrappers": (
        _write(
            pickles.archive(
                pickles.dictionary(
                    model=pickles.dictionary(state_dict=pickles.dictionary(a=pickles.tensor()))
                ),
                FOUR,
            )
        ),
        "under 'model' not a plain dictionary of tensors",
    ),
    "list of tensors": (
        _write(pickles.archive(b"]" + pickles.tensor() + b"a", FOUR)),
        "dictionary",
    ),
    "no tensors": (_write(pickles.archive(b"}")), "not a plain dictionary"),
    "names are numbers": (
        _write(pickles.archive(b"}K\x01" + pickles.tensor() + b"s", FOUR)),
        "names",
    ),
    "other model": (
        _write(pickles.archive(pickles.dictionary(fc=pickles.tensor()), FOUR)),
        "not the tensors of a SAM",
    ),
    "part of a SAM": (
        _write(
            pickles.archive(
                b"}" + pickles.text("mask_decoder.iou_token.weight") + pickles.tensor() + b"s", FOUR
            )
        ),
        "no known image encoder",
    ),
    "safetensors header beyond the file": (
        _write(struct.pack("<Q", 2**31) + b"{}"),
        "not a readable safetensors file",
    ),
    "safetensors 2 GB claim": (
        _write(struct.pack("<Q", len(_HEADER)) + _HEADER + b"\0" * 64),
        "not a readable safetensors file",
    ),
    "legacy without storages": (
        _write(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)),
        "breaks off",
    ),
}


@pytest.fixture(scope="module")
def tiny_pth(tmp_path_factory, tiny_arrays, lazily) -> bytes:
    from weights_converter.pth_writer import write_pth

    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    write_pth(str(path), lazily(tiny_arrays))
    return path.read_bytes()


@pytest.mark.parametrize("case", CORPUS)
def test_broken_file_gets_one_line_and_leaves_nothing(tmp_path, tiny_pth, case):
    make, message = CORPUS[case]
    source = tmp_path / "source.pth"
    make(source, tiny_pth)
    with pytest.raises(UserError, match=message) as error:
        convert(str(source), str(tmp_path / "out"))
    first, *_ = str(error.value).splitlines()
    assert len(str(error.value).splitlines()) == 1
    assert first.startswith(f"{source}: ")
    assert len(first) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


def _changed(tiny_arrays, lazily, path, change):
    from weights_converter.pth_writer import write_pth

    arrays = dict(tiny_arrays)
    change(arrays)
    write_pth(str(path), lazily(arrays))


def test_differing_tensors_are_all_listed(tmp_path, tiny_arrays, lazily):
    def change(arrays):
        del arrays["mask_decoder.iou_token.weight"]
        for index in (0, 1):
            del arrays[f"image_encoder.layers.0.blocks.0.conv{index + 1}.c.weight"]
            arrays[f"mask_decoder.transformer.layers.{index}.norm5.weight"] = np.zeros(
                3, np.float32
            )
        arrays["prompt_encoder.no_mask_embed.weight"] = np.zeros((1, 31), np.float32)
        arrays["prompt_encoder.not_a_point_embed.weight"] = np.zeros((1, 32), np.int64)

    path = tmp_path / "changed.pth"
    _changed(tiny_arrays, lazily, path, change)
    with pytest.raises(UserError) as error:
        convert(str(path), str(tmp_path / "out"))
    assert str(error.value).removeprefix(f"{path}: ").splitlines() == [
        "does not fit tiny: 2 unknown, 3 missing, 2 unfitting tensors",
        "  in the file, not in the model:",
        "    mask_decoder.transformer.layers.{0,1}.norm5.weight"
        "   (nearest known: mask_decoder.transformer.layers.*.norm4.weight)",
        "  in the model, not in the file:",
        "    image_encoder.layers.0.blocks.0.conv1.c.weight",
        "    image_encoder.layers.0.blocks.0.conv2.c.weight",
        "    mask_decoder.iou_token.weight",
        "  of the wrong kind:",
        "    prompt_encoder.no_mask_embed.weight: shape (1, 31), the model has (1, 32)",
        "    prompt_encoder.not_a_point_embed.weight: elements of type int64, no floating point",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["changed.pth"]


def test_command_line_says_it_in_one_line_and_exits_1(tmp_path):
    source = tmp_path / "evil.pth"
    source.write_bytes(_zipped(_exploit(tmp_path / "trace", 2)))
    command = [sys.executable, "-m", "weights_converter.convert", "--input", str(source)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith(f"error: {source}: the pickle asks for ")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_missing_file_names_what_is_known(tmp_path):
    with pytest.raises(UserError, match=r"neither a file, nor .*\(lite_medsam, sam_vit_b"):
        convert(str(tmp_path / "nowhere.pth"), str(tmp_path / "out"))


def test_directory_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_file(str(tmp_path))
