"""Prompts from JSON: what is read, and how each mistake is named."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medsam_jax.errors import UserError
from medsam_jax.inference.predict_file import FilePredictor, Request
from medsam_jax.inference.predict_folder import predict_path
from medsam_jax.inference.prompt_file import arguments, from_json

BOX = [1, 2, 9, 8]


def write(path, prompts) -> str:
    path.write_text(json.dumps({"a.png": prompts}))
    return str(path)


def test_prompts_of_one_label_are_one_object(tmp_path):
    prompts = [
        {"label": 5, "name": "liver", "slice": 3, "box": BOX},
        {"points": [[4, 5, 1], [6, 7, 0]]},
        {"label": 5, "slice": 7, "box": BOX, "points": [[1, 1, 0]]},
    ]
    liver, second = from_json(write(tmp_path / "p.json", prompts))["a.png"].objects
    assert (liver.label, liver.name, sorted(liver.slices)) == (5, "liver", [3, 7])
    assert (second.label, second.name, list(second.slices)) == (2, None, [None])
    given = arguments(second.slices[None])
    assert given["point_coords"].tolist() == [[4, 5], [6, 7]]
    assert given["point_labels"].tolist() == [1, 0]
    assert sorted(arguments(liver.slices[7])) == ["box", "point_coords", "point_labels"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "list of prompts is empty"),
        ([BOX], "prompt 1: .* give an object with box or points"),
        ([{"label": 1}], "has neither box nor points"),
        ([{"boxes": BOX}], "unknown field 'boxes'; use label, name, slice, box, points"),
        ([{"box": [1, 2, 3]}], "give .x0, y0, x1, y1."),
        ([{"box": "1,2,3,4"}], "box '1,2,3,4'"),
        ([{"points": [[1, 2]]}], "give .*label 1 or 0"),
        ([{"box": BOX, "label": 0}], "label 0; give a whole number from 1"),
        ([{"box": BOX, "label": 70000}], "label 70000"),
        ([{"box": BOX, "slice": -1}], "slice -1; give a whole number from 0"),
        ([{"box": BOX, "slice": True}], "slice True"),
        ([{"box": BOX, "label": 1}, {"box": BOX, "label": 1}], "prompt 2: label 1 has a prompt"),
    ],
)
def test_mistakes_are_named(tmp_path, prompts, message):
    with pytest.raises(UserError, match=f"p.json: a.png.*{message}"):
        from_json(write(tmp_path / "p.json", prompts))


def test_an_image_may_name_its_modality_and_window(tmp_path):
    fields = {"modality": "CT", "window": "lung", "prompts": [{"box": BOX}]}
    found = from_json(write(tmp_path / "p.json", fields))["a.png"]
    assert (found.modality, found.window, len(found.objects)) == ("CT", "lung", 1)
    found = from_json(write(tmp_path / "p.json", {"prompts": [{"box": BOX}]}))["a.png"]
    assert (found.modality, found.window) == (None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modality": "CT"}, "has no list of prompts"),
        ({"prompts": [], "modality": "CT"}, "list of prompts is empty"),
        ({"prompts": [{"box": BOX}], "modality": "CTT"}, "modality 'CTT' is unknown; use one of"),
        ({"prompts": [{"box": BOX}], "modality": 3}, "modality 3; give a text"),
        ({"prompts": [{"box": BOX}], "windows": "lung"}, "unknown field 'windows'"),
        (
            {"prompts": [{"box": BOX}], "modality": "MR", "window": "lung"},
            "window 'lung' is for CT, the modality is MR",
        ),
    ],
)
def test_mistakes_of_an_image_are_named(tmp_path, fields, message):
    with pytest.raises(UserError, match=f"p.json: a.png.*{message}"):
        from_json(write(tmp_path / "p.json", fields))


def test_modality_and_window_by_image_reach_the_model(compiled_predictor, monkeypatch, tmp_path):
    """Two files, CT in two windows: the records and the masks are those of single commands."""
    monkeypatch.setattr(FilePredictor, "_predictor", compiled_predictor)
    scans = tmp_path / "scans"
    scans.mkdir()
    voxels = np.random.default_rng(0).uniform(-1000, 800, (1, 30, 40)).astype(np.int16)
    for name in ("a", "b", "c"):
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(scans / f"{name}.nii.gz"))
    box = [{"box": [4, 4, 30, 20]}]
    prompts = {
        "a.nii.gz": {"modality": "CT", "window": "lung", "prompts": box},
        "b.nii.gz": {"modality": "MR", "prompts": box},
        "c.nii.gz": box,
    }
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    request = Request(
        "tiny", str(scans), tmp_path / "out", prompts=str(tmp_path / "p.json"), modality="CT"
    )
    predict_path(request)
    records = {name: json.loads((tmp_path / f"out/{name}.json").read_text()) for name in "abc"}
    assert [records[name]["modality"] for name in "abc"] == ["CT", "MR", "CT"]
    assert [records[name]["ct_window"] for name in "abc"] == ["lung", None, "wide"]
    for name, modality, window in (("a", "CT", "lung"), ("b", "MR", None), ("c", "CT", None)):
        single = tmp_path / f"single_{name}"
        ask = {"boxes": [box[0]["box"]], "modality": modality, "window": window}
        predict_path(Request("tiny", str(scans / f"{name}.nii.gz"), single, **ask))
        assert (single / f"{name}_mask.nii.gz").read_bytes() == (
            tmp_path / f"out/{name}_mask.nii.gz"
        ).read_bytes()


def test_names_of_a_prompt_masks_labels_reach_the_record(compiled_predictor, monkeypatch, tmp_path):
    monkeypatch.setattr(FilePredictor, "_predictor", compiled_predictor)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 47), np.uint8)
    mask = np.zeros((33, 47), np.uint8)
    mask[4:12, 5:20], mask[15:30, 20:44] = 1, 5
    for name, array in (("a.png", pixels), ("m.png", mask)):
        Image.fromarray(array).save(tmp_path / name)
    paths = {"prompt_mask": str(tmp_path / "m.png"), "label_names": ["1=liver"]}
    predict_path(Request("tiny", str(tmp_path / "a.png"), tmp_path / "out", **paths))
    objects = json.loads((tmp_path / "out" / "a.json").read_text())["objects"]
    assert [(found["label"], found["name"]) for found in objects] == [(1, "liver"), (5, None)]


@pytest.mark.parametrize("names", [["liver"], ["1="], ["x=liver"], ["1=liver", "1=spleen"]])
def test_names_of_labels_that_cannot_be_read_are_one_line(tmp_path, names):
    request = Request("m", "a.png", tmp_path, prompt_mask="m.png", label_names=names)
    with pytest.raises(UserError, match="--labels: .*; give ID=NAME"):
        FilePredictor(request)
