"""Checkpoint directories: complete or absent, and checked when read."""

import dataclasses
import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from medsam_jax import hub
from medsam_jax.errors import UserError
from medsam_jax.models import checkpoint
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import Sam, SamConfig
from tests.names import AWKWARD


@pytest.fixture(scope="module")
def model() -> Sam:
    """Random numbers in every variable; filling a real one eagerly would take half a minute."""
    rng = np.random.default_rng(3)
    template = flatten_state(checkpoint.abstract_model(SamConfig.tiny()))
    params = {path: rng.standard_normal(v.shape, np.float32) for path, v in template.items()}
    return checkpoint.build_model(SamConfig.tiny(), params, "random")


@pytest.fixture
def directory(tmp_path, model):
    path = tmp_path / "checkpoint"
    checkpoint.save_model(path, flatten_state(model), model.config, {"licence": "MIT", "step": 7})
    return path


def test_model_comes_back_the_same(directory, model):
    loaded = hub.load_model(directory)
    assert loaded.config == model.config
    expected = flatten_state(model)
    found = flatten_state(loaded)
    assert list(found) == list(expected)
    for path, value in expected.items():
        assert found[path].dtype == value.dtype
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_built_model_is_an_initialised_one_but_for_the_values(model):
    initialised = nnx.eval_shape(lambda: Sam(SamConfig.tiny(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    expected_graph, expected_state = nnx.split(initialised)
    assert graph == expected_graph
    kinds = [(path, type(variable)) for path, variable in nnx.to_flat_state(state)]
    assert kinds == [(path, type(v)) for path, v in nnx.to_flat_state(expected_state)]


def test_other_input_size(tmp_path):
    encoder = ViTConfig(16, 2, 2, (1,), window_size=2)
    config = dataclasses.replace(SamConfig.tiny(), encoder=encoder)  # 4 x 4 tokens
    template = flatten_state(checkpoint.abstract_model(config))
    params = {path: np.ones(value.shape, np.float32) for path, value in template.items()}
    params["image_encoder.pos_embed"] = np.tile(np.arange(4.0)[:, None, None], (1, 1, 4, 16))
    checkpoint.save_model(tmp_path / "a", params, config, {})
    model = hub.load_model(tmp_path / "a", image_size=128)
    assert (model.config.image_size, model.config.preprocessing.image_size) == (128, 128)
    table = model.image_encoder.pos_embed[...]
    assert table.shape == (1, 8, 8, 16)
    # Half-pixel centres, clamped at the border: F.interpolate(align_corners=False).
    expected = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    np.testing.assert_allclose(table[0, :, 0, 0], expected, atol=1e-6)
    assert model.image_encoder.blocks[1].attn.rel_pos_h.shape == (15, 8)
    assert model.image_encoder.blocks[0].attn.rel_pos_h.shape == (3, 8)
    with pytest.raises(UserError, match="image_size: 100 is no multiple of the patch, 16 pixels"):
        hub.load_model(tmp_path / "a", image_size=100)


def test_metadata_is_kept(directory):
    metadata = checkpoint.read_metadata(directory)
    assert (metadata["licence"], metadata["step"]) == ("MIT", 7)
    assert metadata["architecture"]["kind"] == "sam"
    assert metadata["created_by"]["jax"] == jax.__version__
    assert checkpoint.read_extras(directory) == {}


def test_parts_hold_all_arrays_in_their_stored_types(tmp_path, monkeypatch, model):
    monkeypatch.setattr(checkpoint, "_PART_BYTES", 2**16)
    params = {
        path: np.asarray(value, np.float16 if index % 2 else np.float32)
        for index, (path, value) in enumerate(flatten_state(model).items())
    }
    checkpoint.save_model(tmp_path / "a", params, model.config, {})
    assert len(list((tmp_path / "a" / "params").iterdir())) > 1
    found = checkpoint.read_params(tmp_path / "a")
    assert list(found) == list(params)
    for path, value in params.items():
        assert found[path].dtype == value.dtype
        assert found[path].tobytes() == value.tobytes()


def test_exists(directory, model):
    with pytest.raises(UserError, match="checkpoint: exists"):
        checkpoint.save_model(directory, flatten_state(model), model.config, {})
    checkpoint.save_model(directory, flatten_state(model), model.config, {"n": 2}, overwrite=True)
    assert checkpoint.read_metadata(directory)["n"] == 2
    assert [path.name for path in directory.parent.iterdir()] == ["checkpoint"]


def test_failure_leaves_the_old_one(directory, model):
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save_model(
            directory, flatten_state(model), model.config, {"n": object()}, overwrite=True
        )
    assert checkpoint.read_metadata(directory)["step"] == 7
    assert [path.name for path in directory.parent.iterdir()] == ["checkpoint"]


def _edit(directory, **changes):
    metadata = json.loads((directory / "model.json").read_text())
    metadata["architecture"] |= changes.pop("architecture", {})
    (directory / "model.json").write_text(json.dumps(metadata | changes))


def test_refuses_what_it_cannot_read(tmp_path, directory):
    with pytest.raises(UserError, match=r"not a checkpoint directory \(no model\.json\)"):
        checkpoint.read_metadata(tmp_path)
    with pytest.raises(UserError, match="a file; make a checkpoint directory of it"):
        hub.load_model(directory / "model.json")
    with pytest.raises(UserError, match="'nothing': neither a file, nor"):
        hub.load_model("nothing")
    (directory / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.json: cannot be read"):
        hub.load_model(directory)


def test_refuses_another_version(directory):
    _edit(directory, format_version=99)
    with pytest.raises(UserError, match="format_version 99, this program reads 1"):
        hub.load_model(directory)


def test_refuses_another_architecture(directory):
    _edit(directory, architecture={"embed_dim": 64})
    with pytest.raises(UserError, match=r"arrays do not fit its model\.json: .* has shape"):
        hub.load_model(directory)
    _edit(directory, architecture={"kind": "resnet"})
    with pytest.raises(UserError, match="architecture kind 'resnet' is unknown"):
        hub.load_model(directory)
    _edit(directory, architecture={"kind": "sam", "depth": 3})
    with pytest.raises(UserError, match="architecture does not fit this program .*depth"):
        hub.load_model(directory)


def test_a_wrong_contract_is_refused_by_file(directory, model):
    contract = model.config.preprocessing.to_dict() | {"ct_windows": ["bone"]}
    _edit(directory, architecture={"preprocessing": contract})
    with pytest.raises(UserError, match=r"model\.json: .*ct_windows bone .*; name some of these"):
        hub.load_model(directory)


def test_refuses_damaged_arrays(directory):
    for file in (directory / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"params/0: cannot be read"):
        hub.load_model(directory)


_PROCESS = """
import sys
import jax, numpy as np
from medsam_jax.models import checkpoint
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.sam import SamConfig

index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
template = flatten_state(checkpoint.abstract_model(SamConfig.tiny()))
params = {path: np.full(v.shape, index, np.float32) for path, v in template.items()}
if index == 0:
    checkpoint.save_model(directory, params, SamConfig.tiny(), {})
else:
    read = checkpoint.read_params(sys.argv[4])
    assert len(read) == len(params)
print("done")
"""


def test_processes_of_a_run_do_not_wait_for_each_other(tmp_path, model):
    """Process 0 writes what it alone exports; process 1 reads something else meanwhile."""
    template = flatten_state(model)
    zeros = {path: np.zeros(value.shape, np.float32) for path, value in template.items()}
    checkpoint.save_model(tmp_path / "zeros", zeros, model.config, {})
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    arguments = [port, str(tmp_path / "out"), str(tmp_path / "zeros")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(index), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert output.strip().endswith("done"), errors
    assert all((value == 0).all() for value in checkpoint.read_params(tmp_path / "out").values())


@pytest.mark.parametrize("name", AWKWARD)
def test_any_folder_holds_a_checkpoint(tmp_path, model, name):
    directory = tmp_path / name / name
    checkpoint.save_model(directory, flatten_state(model), model.config, {})
    found = checkpoint.read_params(hub.resolve(directory))
    for path, value in flatten_state(model).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).rename(tmp_path / "moved [x]")
    assert checkpoint.read_params(tmp_path / "moved [x]" / name).keys() == found.keys()


def test_what_cannot_be_read_back_is_not_written(tmp_path, model, monkeypatch):
    """Orbax itself leaves the arrays of a folder with brackets where it does not find them."""
    monkeypatch.setattr(checkpoint, "plain_path", lambda path: path.absolute())
    directory = tmp_path / "w [v2]" / "tiny"
    with pytest.raises(UserError, match="tiny: .*cannot be read back"):
        checkpoint.save_model(directory, flatten_state(model), model.config, {})
    assert not list(directory.parent.iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path, model):
    params = {path: np.array(value) for path, value in flatten_state(model).items()}
    params["mask_decoder.iou_token.embedding"][0, 1] = np.inf
    checkpoint.save_model(tmp_path / "a", params, model.config, {})
    message = r"a: mask_decoder\.iou_token\.embedding: 1 of \d+ weights are NaN or infinite"
    with pytest.raises(UserError, match=message):
        hub.load_model(tmp_path / "a")


def test_files_of_the_desktop_beside_the_parts_are_no_parts(directory):
    (directory / "params" / ".DS_Store").touch()
    assert checkpoint.read_params(directory)
