"""Names that training scripts change, folders of the hub, and weights that are not finite."""

import json

import ml_dtypes
import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.hub import load_model
from medsam_jax.io.safetensors import write_safetensors
from medsam_jax.models import checkpoint
from tests.weights_converter import pickles
from weights_converter.convert import convert
from weights_converter.inspection import inspect
from weights_converter.pth_writer import write_pth
from weights_converter.readers import file_in, read_file

WRITERS = {"pth": write_pth, "safetensors": write_safetensors}


def converted(source, tmp_path) -> dict[str, np.ndarray]:
    convert(str(source), str(tmp_path / "out"))
    return checkpoint.read_params(tmp_path / "out")


@pytest.fixture
def expected(tmp_path, tiny_arrays, lazily) -> dict[str, np.ndarray]:
    write_pth(str(tmp_path / "plain.pth"), lazily(tiny_arrays))
    convert(str(tmp_path / "plain.pth"), str(tmp_path / "plain"))
    return checkpoint.read_params(tmp_path / "plain")


def assert_equal(found, expected):
    assert list(found) == list(expected)
    assert all(found[path].tobytes() == expected[path].tobytes() for path in expected)


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize(
    ("rename", "removed"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: f"model.{name}", "model."),
        (lambda name: f"sam.{name}", "sam."),
        (lambda name: f"module._orig_mod.net.sam.{name}", "module._orig_mod.net.sam."),
        (
            lambda name: name.replace("image_encoder.", "image_encoder._orig_mod."),
            "_orig_mod.",
        ),
    ],
)
def test_prefixes_come_off_and_are_said(
    tmp_path, tiny_arrays, lazily, expected, capsys, format, rename, removed
):
    source = tmp_path / f"a.{format}"
    WRITERS[format](str(source), lazily({rename(k): v for k, v in tiny_arrays.items()}))
    assert_equal(converted(source, tmp_path), expected)
    assert f"{source}: took {removed!r} off the tensors' names" in capsys.readouterr().err
    assert read_file(str(source)).prefix == removed


def test_a_prefix_that_some_names_lack_is_named(tmp_path, tiny_arrays, lazily):
    arrays = {f"model.{name}": value for name, value in tiny_arrays.items()}
    write_pth(str(tmp_path / "a.pth"), lazily(arrays | {"loss.weight": np.ones(2, np.float32)}))
    with pytest.raises(UserError, match=r"under 'model\.', beside 1 others .*'loss\.weight'"):
        convert(str(tmp_path / "a.pth"), str(tmp_path / "out"))


@pytest.mark.parametrize("beside", [(), ("ema",)])
def test_a_state_dict_under_any_key(tmp_path, beside):
    tensors = pickles.dictionary(**{"image_encoder.x": pickles.tensor()})
    content = pickles.dictionary(
        epoch=b"K\x07", network=tensors, empty=b"}", **dict.fromkeys(beside, tensors)
    )
    four = {"data/0": np.arange(4, dtype=np.float32).tobytes()}
    (tmp_path / "a.pth").write_bytes(pickles.archive(content, four))
    if beside:
        with pytest.raises(UserError, match="holds tensors under 'network', 'ema'; save the one"):
            read_file(str(tmp_path / "a.pth"))
        return
    file = read_file(str(tmp_path / "a.pth"))
    assert (file.wrapper, list(file.tensors)) == ("network", ["image_encoder.x"])


def hub_folder(tmp_path, kind, arrays, lazily):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "sam"}')
    (folder / "README.md").write_text("a model")
    if kind == "shards":
        names = list(arrays)
        half = dict.fromkeys(names[::2], "model-00001-of-00002.safetensors")
        half |= dict.fromkeys(names[1::2], "model-00002-of-00002.safetensors")
        for file in set(half.values()):
            part = {name: arrays[name] for name in names if half[name] == file}
            write_safetensors(str(folder / file), lazily(part))
        index = {"metadata": {}, "weight_map": {name: half[name] for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "pytorch_model.bin":
        write_pth(str(folder / kind), lazily(arrays))
    else:
        write_safetensors(str(folder / kind), lazily(arrays))
    return folder


@pytest.mark.parametrize(
    "kind", ["model.safetensors", "pytorch_model.bin", "shards", "x.safetensors"]
)
def test_a_folder_of_the_hub_is_read(tmp_path, tiny_arrays, lazily, expected, kind):
    folder = hub_folder(tmp_path, kind, tiny_arrays, lazily)
    assert_equal(converted(folder, tmp_path), expected)
    assert "architecture:" in inspect(str(folder))


def test_a_folder_of_the_hub_is_no_checkpoint_directory(tmp_path, tiny_arrays, lazily):
    folder = hub_folder(tmp_path, "model.safetensors", tiny_arrays, lazily)
    with pytest.raises(UserError, match=r"--input \S+/hub/model\.safetensors --output DIRECTORY"):
        load_model(folder)


def test_unusable_folders(tmp_path):
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds a\.pth, b\.pth; name one of these files"):
        file_in(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(UserError, match=r"gone\.safetensors: cannot be read"):
        convert(str(tmp_path), str(tmp_path / "out"))
    for content in ("{", "[]", '{"weight_map": {}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json: .*get the folder again"):
            convert(str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize("format", ["orbax", "pth", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, tiny_arrays, lazily, format, dtype):
    name = "mask_decoder.iou_token.weight"
    value = tiny_arrays[name].astype(dtype)
    value[0, :2] = np.nan, np.inf
    write_pth(str(tmp_path / "a.pth"), lazily(tiny_arrays | {name: value}))
    message = rf"a\.pth: {name}: 2 of {value.size} weights are NaN or infinite"
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "a.pth"), str(tmp_path / "out"), format=format)
    assert not (tmp_path / "out").exists()
