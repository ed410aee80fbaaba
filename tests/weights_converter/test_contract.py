"""The contract of a checkpoint survives a file format that cannot carry it."""

import dataclasses
import json

import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.models import checkpoint
from medsam_jax.models.sam import SamConfig
from tests.weights_converter.test_inspection import _lines
from weights_converter import conversion
from weights_converter.convert import convert
from weights_converter.inspection import inspect
from weights_converter.pth_writer import write_pth
from weights_converter.readers import read_file

TUNED = dataclasses.replace(
    SamConfig.tiny(),
    automatic_prompts="points",
    preprocessing=dataclasses.replace(
        SamConfig.tiny().preprocessing,
        mask_threshold=-0.75,
        ct_windows=("lung", "soft_tissue"),
        upsample="probabilities",
        pixel_mean=(1.0, 2.0, 3.0),
    ),
)
METADATA = {"licence": "CC-BY-4.0", "credit": "somebody", "training": {"step": 7, "cases": [1]}}


@pytest.fixture
def tuned(tmp_path, tiny_arrays, lazily) -> str:
    """A checkpoint directory whose contract differs from its kind's in every field."""
    write_pth(str(tmp_path / "start.pth"), lazily(tiny_arrays))
    state = conversion.state_dict_from_file(read_file(str(tmp_path / "start.pth")), TUNED)
    state = dataclasses.replace(state, metadata=METADATA)
    conversion.save_directory(state, str(tmp_path / "tuned"))
    return str(tmp_path / "tuned")


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_round_trip_keeps_every_field(tmp_path, tuned, format, capfd):
    file = str(tmp_path / f"out.{format}")
    convert(tuned, file, format=format)
    convert(file, str(tmp_path / "back"))
    assert checkpoint.read_config(tmp_path / "back") == TUNED
    before = checkpoint.read_metadata(tuned)
    after = checkpoint.read_metadata(tmp_path / "back")
    assert set(after) == set(before)
    for field in set(before) - {"source", "created_by"}:
        assert after[field] == before[field], field
    assert capfd.readouterr().err == ""


def test_without_the_json_convert_says_what_is_assumed(tmp_path, tuned, capfd):
    convert(tuned, str(tmp_path / "out.pth"), format="pth")
    (tmp_path / "out.pth.json").unlink()
    convert(str(tmp_path / "out.pth"), str(tmp_path / "back"))
    said = capfd.readouterr().err
    for words in ("no out.pth.json", "mask threshold: 0 ", "automatic prompts: boxes"):
        assert words in said
    for words in ("CT windows trained on: not known", "licence: unknown", "recipe lite"):
        assert words in said
    assert checkpoint.read_config(tmp_path / "back") == SamConfig.tiny()


def test_licence_is_not_claimed_for_a_file_that_changed(tmp_path, tuned, tiny_arrays, lazily):
    convert(tuned, str(tmp_path / "out.pth"), format="pth")
    arrays = {name: np.zeros_like(value) for name, value in tiny_arrays.items()}
    write_pth(str(tmp_path / "out.pth"), lazily(arrays))
    convert(str(tmp_path / "out.pth"), str(tmp_path / "back"))
    assert checkpoint.read_metadata(tmp_path / "back")["licence"] == "unknown"
    assert checkpoint.read_config(tmp_path / "back") == TUNED


def test_inspect_shows_the_whole_contract_of_file_and_directory(tmp_path, tuned):
    convert(tuned, str(tmp_path / "out.pth"), format="pth")
    for place in (tuned, str(tmp_path / "out.pth")):
        lines = _lines(inspect(place))
        assert lines["licence"] == "CC-BY-4.0"
        assert lines["preprocessing"] == "recipe lite, min_max, CT in lung"
        assert lines["CT windows trained on"] == "lung, soft_tissue"
        assert lines["mask threshold"] == "-0.75 on the logits, interpolated as probabilities"
        assert lines["automatic prompts"] == "points"
    assert lines["contract"] == "from out.pth.json"


def test_json_is_replaced_only_when_asked(tmp_path, tuned):
    (tmp_path / "out.pth.json").write_text("mine")
    with pytest.raises(UserError, match=r"out\.pth\.json: exists; choose another"):
        convert(tuned, str(tmp_path / "out.pth"), format="pth")
    assert not (tmp_path / "out.pth").exists()
    convert(tuned, str(tmp_path / "out.pth"), format="pth", overwrite=True)
    assert json.loads((tmp_path / "out.pth.json").read_text())["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not the contract of out.pth"),
        ('{"format_version": 1}', "architecture kind None is unknown"),
        ('{"format_version": 1, "architecture": 3}', "architecture is not a table"),
        ('{"format_version": 1, "architecture": {"kind": "sam"}}', "does not fit this program"),
    ],
)
def test_a_damaged_json_is_one_line(tmp_path, tuned, text, message):
    convert(tuned, str(tmp_path / "out.pth"), format="pth")
    (tmp_path / "out.pth.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        convert(str(tmp_path / "out.pth"), str(tmp_path / "back"))
    assert "out.pth.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()
