"""Data sets of nnU-Net, in both versions, and of the Decathlon."""

import json
import pathlib

import pytest

from datasets.medical_slices import nnunet, pairing
from medsam_jax.data.manifest import read_manifest
from medsam_jax.errors import UserError
from tests.datasets.test_manifest import touch

LABELS = {"background": 0, "liver": 1}


def described(folder, **content):
    (folder / "dataset.json").write_text(json.dumps({"labels": LABELS} | content))


def short(rows):
    return [(row[0], pathlib.Path(row[1]).name, pathlib.Path(row[2]).name, row[3]) for row in rows]


def test_ignored_voxels_are_no_object(tmp_path):
    described(tmp_path, channel_names={"0": "CT"}, labels=LABELS | {"ignore": 2})
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    found = nnunet.read_nnunet(tmp_path, "t")
    assert found.notes == ["labels: --labels=1=liver"]
    assert found.warnings == ['label 2 is nnU-Net\'s "ignore": the column ignore leaves it out']
    pairing.write_manifest(tmp_path / "cases.csv", found.rows, found.ignore)
    (case,), problems = read_manifest(tmp_path / "cases.csv")
    assert (case.ignore, problems) == ((2,), [])


def test_decathlon(tmp_path):
    pairs = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"]
    described(tmp_path, modality={"0": "CT"}, labels={"0": "background", "1": "x"}, training=pairs)
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTr/._a.nii.gz", "labelsTr/a.nii.gz")
    touch(tmp_path, "imagesTr/c.nii.gz", "labelsTr/b.nii.gz", "imagesTs/d.nii.gz")
    found = nnunet.read_nnunet(tmp_path, "t")
    assert short(found.rows) == [("a", "a.nii.gz", "a.nii.gz", "CT")]
    assert found.notes == ["labels: --labels=1=x"]
    assert [line.removeprefix(f"{tmp_path}/") for line in found.problems] == [
        "imagesTr/b.nii.gz: does not exist, but b.nii.gz is there",
        "imagesTr/c.nii.gz: no mask in labelsTr",
        "imagesTs: 1 test images have no masks",
    ]


def test_channels_in_one_file_are_refused(tmp_path):
    pairs = [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]
    described(tmp_path, modality={"0": "FLAIR", "1": "T1w"}, training=pairs)
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(UserError, match=r"2 channels \(FLAIR, T1w\) in one 4D file a case; .*--im"):
        nnunet.read_nnunet(tmp_path, "t")


def test_nnunet_1_lists_names_without_the_channel(tmp_path):
    pairs = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    described(tmp_path, modality={"0": "T1", "1": "T2"}, training=pairs)
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    rows = nnunet.read_nnunet(tmp_path, "t").rows
    assert short(rows) == [
        ("a", "a_0000.nii.gz", "a.nii.gz", "T1"),
        ("a", "a_0001.nii.gz", "a.nii.gz", "T2"),
    ]


def test_paths_of_the_key_dataset(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "t2.nii.gz"
    listed = {"p 1": {"images": ["x/a.nii.gz", str(elsewhere)], "label": "y/a.nii.gz"}}
    described(tmp_path, channel_names={"0": "T1", "1": "T2"}, dataset=listed)
    touch(tmp_path, "x/a.nii.gz", "y/a.nii.gz", "elsewhere/t2.nii.gz")
    found = nnunet.read_nnunet(tmp_path, "t")
    assert short(found.rows) == [
        ("p 1", "a.nii.gz", "a.nii.gz", "T1"),
        ("p 1", "t2.nii.gz", "a.nii.gz", "T2"),
    ]
    assert not found.problems


def test_colours_of_a_picture_are_one_image(tmp_path):
    names = {"0": "R", "1": "G", "2": "B"}
    described(tmp_path, channel_names=names, file_ending=".png")
    touch(tmp_path, "imagesTr/a_0000.png", "labelsTr/a.png")
    found = nnunet.read_nnunet(tmp_path, "t")
    assert short(found.rows) == [("a", "a_0000.png", "a.png", "RGB")]
    assert not found.problems


@pytest.mark.parametrize(
    ("labels", "flag"),
    [
        ({"background": 0, "a": 1, "b": 2}, "1=a,2=b"),
        ({"0": "background", "2": "b", "1": "a"}, "1=a,2=b"),
        ({"background": "0", "a": "1"}, "1=a"),
        ({"background": 0, "a": [1]}, "1=a"),
        (["background", "a", "b"], "1=a,2=b"),
    ],
)
def test_forms_of_the_labels(tmp_path, labels, flag):
    described(tmp_path, channel_names={"0": "CT"}, labels=labels)
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    found = nnunet.read_nnunet(tmp_path, "t")
    assert (found.notes, found.warnings) == ([f"labels: --labels={flag}"], [])


def test_labels_that_only_regions_have_are_named(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    described(tmp_path, channel_names={"0": "FLAIR"}, labels=labels)
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    found = nnunet.read_nnunet(tmp_path, "t")
    assert found.notes == ["labels: --labels=3=enhancing"]
    assert found.warnings[0].startswith("region 'whole' has the labels 1, 2, which have no name")


def test_a_modality_replaces_the_only_channel(tmp_path):
    described(tmp_path, channel_names={"0": "noNorm"})
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert nnunet.read_nnunet(tmp_path, "t", "US").rows[0][3] == "US"
    described(tmp_path, channel_names={"0": "T1", "1": "T2"})
    with pytest.raises(UserError, match=r"'MR' for several channels \(T1, T2\); leave it out"):
        nnunet.read_nnunet(tmp_path, "t", "MR")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"modality": {"0": "CT"}}',
        '{"modality": {"0": "CT"}, "labels": 3}',
        '{"modality": {"x": "CT"}, "labels": {"a": 1}}',
        '{"modality": {"0": "CT"}, "labels": {"a": 1}, "training": ["a"]}',
        '{"modality": {"0": "CT"}, "labels": {"a": 1}, "dataset": {"a": 1}}',
    ],
)
def test_a_damaged_description_is_one_line(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json: .*; check it") as error:
        nnunet.read_nnunet(tmp_path, "t")
    assert "\n" not in str(error.value)
