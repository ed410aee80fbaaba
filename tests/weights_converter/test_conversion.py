"""In and out again: same tensors, names, order, types and bytes, for every format and wrapper."""

import dataclasses
import json

import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.io.safetensors import write_safetensors
from medsam_jax.io.tensors import LazyTensor
from medsam_jax.models import checkpoint
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import SamConfig
from tests.weights_converter import pickles
from weights_converter import conversion, names
from weights_converter.convert import convert
from weights_converter.pth_reader import read_pth
from weights_converter.pth_writer import write_pth
from weights_converter.readers import read_file

WRITERS = {"pth": write_pth, "safetensors": write_safetensors}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("format", WRITERS)
def test_round_trip_through_a_directory(
    tmp_path, tiny_arrays, lazily, as_dtype, assert_same, format, dtype
):
    arrays = as_dtype(tiny_arrays, dtype)
    source, back = tmp_path / f"source.{format}", tmp_path / f"back.{format}"
    WRITERS[format](str(source), lazily(arrays))
    convert(str(source), str(tmp_path / "directory"))
    convert(str(tmp_path / "directory"), str(back), format=format)
    assert_same(read_file(str(back)).tensors, arrays)
    assert back.read_bytes() == source.read_bytes()


def _with_wrapper(arrays: dict[str, np.ndarray], wrapper: str, prefix: str) -> bytes:
    """Returns a training script's checkpoint: wrapped tensors, an epoch and an optimiser."""
    entries, members = b"", {}
    for index, (name, array) in enumerate(arrays.items()):
        storage = {"float32": "FloatStorage", "int64": "LongStorage"}[array.dtype.name]
        strides = tuple(stride // array.itemsize for stride in array.strides)
        entries += pickles.text(prefix + name)
        entries += pickles.tensor(str(index), storage, array.size, array.shape, strides)
        members[f"data/{index}"] = array.tobytes()
    state = b"}(" + entries + b"u"
    if not wrapper:
        return pickles.archive(state, members)
    beside = {"epoch": b"K\x07", "optimizer": pickles.dictionary(state=b"}", param_groups=b"]")}
    return pickles.archive(pickles.dictionary(**beside, **{wrapper: state}), members)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "model_state_dict"])
def test_wrappers_come_off_and_the_rest_stays(tmp_path, tiny_arrays, assert_same, wrapper, prefix):
    source = tmp_path / "wrapped.pth"
    source.write_bytes(_with_wrapper(tiny_arrays, wrapper, prefix))
    convert(str(source), str(tmp_path / "directory"))
    convert(str(tmp_path / "directory"), str(tmp_path / "back.pth"), format="pth")
    assert_same(read_pth(str(tmp_path / "back.pth")).tensors, tiny_arrays)
    facts = checkpoint.read_metadata(tmp_path / "directory")["source"]
    assert (facts["wrapper"], facts["prefix"]) == (wrapper, prefix)


# Names and shapes of a miniature SAM with a ViT, whose tensors transformers has names for.
TINY_VIT = dataclasses.replace(
    SamConfig.tiny(), name="tiny_vit", encoder=ViTConfig(16, 2, 2, (1,), window_size=2)
)


@pytest.fixture(scope="module")
def vit_arrays() -> dict[str, np.ndarray]:
    """segment_anything's names and PyTorch's shapes."""
    rng = np.random.default_rng(1)
    template = flatten_state(checkpoint.abstract_model(TINY_VIT))
    leaves = {path: names.torch_leaf(path, len(v.shape)) for path, v in template.items()}
    return {
        name: rng.standard_normal(leaf.torch_shape(template[path].shape)).astype(np.float32)
        for path, (name, leaf) in leaves.items()
    }


def _in_transformers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {names.to_naming(name, names.TRANSFORMERS): value for name, value in arrays.items()}
    return renamed | {alias: renamed[name] for alias, name in names.ALIASES.items()}


@pytest.mark.parametrize("alias", [True, False])
def test_round_trip_in_transformers_names(tmp_path, vit_arrays, lazily, assert_same, alias):
    arrays = _in_transformers(vit_arrays)
    if not alias:  # safetensors of transformers hold a tied tensor once
        del arrays["prompt_encoder.shared_embedding.positional_embedding"]
    write_safetensors(str(tmp_path / "hf.safetensors"), lazily(arrays))
    file = read_file(str(tmp_path / "hf.safetensors"))
    state = conversion.state_dict_from_file(file, TINY_VIT)
    conversion.save_directory(state, str(tmp_path / "directory"))
    again = conversion.state_dict_from_directory(str(tmp_path / "directory"))
    assert_same(conversion.in_naming(again, names.TRANSFORMERS), arrays)
    ours = conversion.in_naming(again, names.SEGMENT_ANYTHING)
    assert set(ours) == set(vit_arrays)
    for name, value in vit_arrays.items():
        assert ours[name].read().tobytes() == value.tobytes()


def test_two_names_of_one_tensor_must_agree(tmp_path, vit_arrays, lazily):
    arrays = _in_transformers(vit_arrays)
    alias = "prompt_encoder.shared_embedding.positional_embedding"
    arrays[alias] = arrays[alias] + 1
    write_safetensors(str(tmp_path / "hf.safetensors"), lazily(arrays))
    file = read_file(str(tmp_path / "hf.safetensors"))
    with pytest.raises(UserError, match=f"{alias} and its other name hold different values"):
        conversion.state_dict_from_file(file, TINY_VIT)


def test_input_size_is_told_from_the_position_table(tmp_path, vit_arrays, lazily):
    arrays = dict(vit_arrays)
    arrays["image_encoder.pos_embed"] = np.zeros((1, 8, 8, 16), np.float32)
    for axis in "hw":
        arrays[f"image_encoder.blocks.1.attn.rel_pos_{axis}"] = np.zeros((15, 8), np.float32)
    write_pth(str(tmp_path / "a.pth"), lazily(arrays))
    config = conversion.state_dict_from_file(read_pth(str(tmp_path / "a.pth")), TINY_VIT).config
    assert (config.image_size, config.preprocessing.image_size) == (128, 128)


def test_lite_medsam_has_no_transformers_names(tmp_path, tiny_arrays, lazily):
    write_pth(str(tmp_path / "a.pth"), lazily(tiny_arrays))
    with pytest.raises(UserError, match="naming transformers has no name for"):
        convert(
            str(tmp_path / "a.pth"),
            str(tmp_path / "b.safetensors"),
            format="safetensors",
            naming="transformers",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_directory_says_where_it_came_from(tmp_path, tiny_arrays, lazily):
    write_pth(str(tmp_path / "a.pth"), lazily(tiny_arrays))
    convert(str(tmp_path / "a.pth"), str(tmp_path / "directory"))
    metadata = json.loads((tmp_path / "directory" / "model.json").read_text())
    assert metadata["licence"] == "unknown"
    assert metadata["source"] | {"sha256": "", "keys": []} == {
        "file": "a.pth",
        "format": "pth",
        "naming": "segment_anything",
        "wrapper": "",
        "prefix": "",
        "keys": [],
        "sha256": "",
    }
    assert metadata["source"]["keys"] == list(tiny_arrays)
    assert checkpoint.read_config(tmp_path / "directory") == SamConfig.tiny()


def test_existing_output_stays_until_the_new_one_is_complete(tmp_path, tiny_arrays, lazily):
    source, output = tmp_path / "a.pth", tmp_path / "out"
    write_pth(str(source), lazily(tiny_arrays))
    convert(str(source), str(output))
    (output / "mine").touch()
    with pytest.raises(UserError, match="exists; choose another --output, or give --overwrite"):
        convert(str(source), str(output))
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        convert(str(source), str(output), overwrite=True)
    assert (output / "mine").exists()
    write_pth(str(source), lazily(tiny_arrays))
    convert(str(source), str(output), overwrite=True)
    assert not (output / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "out"]


def test_file_does_not_replace_a_directory(tmp_path, tiny_arrays, lazily):
    write_pth(str(tmp_path / "a.pth"), lazily(tiny_arrays))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="a directory, which --format pth cannot replace"):
        convert(str(tmp_path / "a.pth"), str(tmp_path / "out"), format="pth", overwrite=True)


def test_damage_found_while_writing_leaves_nothing(tmp_path, tiny_arrays):
    def broken():
        raise UserError("the last tensor is damaged")

    tensors = {name: LazyTensor.of(array) for name, array in tiny_arrays.items()}
    *_, last = tensors
    tensors[last] = dataclasses.replace(tensors[last], read=broken)
    state = conversion.StateDict(SamConfig.tiny(), tensors, {}, {})
    with pytest.raises(UserError, match="the last tensor is damaged"):
        conversion.save_directory(state, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
