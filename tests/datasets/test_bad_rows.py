"""Rows that a build refuses, leaves out or warns of."""

import numpy as np
import pytest
import SimpleITK as sitk

from datasets.medical_slices import building
from medsam_jax.data.datasets import find_dataset
from medsam_jax.errors import UserError
from tests.datasets.scans import SIDE, make_ct, write_manifest, write_volume
from tests.datasets.test_build import no_card, records, request  # noqa: F401


def bad_rows(folder):
    """A manifest with a good row and one of each kind of bad row."""
    make_ct(folder, "good")
    write_volume(folder / "flat.nrrd", np.full((4, SIDE, SIDE), 7, np.int16))
    write_volume(folder / "empty.nrrd", np.zeros((8, SIDE, SIDE), np.uint8))
    (folder / "cut.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:2000])
    good, mask = "good.nii.gz", "good_mask.nii.gz"
    rows = [
        ("a", good, mask, "CT", "organs", "train"),
        ("b", "missing.nii.gz", mask, "CT", "organs", ""),
        ("c", "cut.nii.gz", mask, "CT", "organs", ""),
        ("d", good, "empty.nrrd", "CT", "organs", ""),
        ("e", "flat.nrrd", mask, "MR", "organs", ""),
        ("f", good, mask, "CT", "organs", "test"),
        ("a", good, mask, "CT", "organs", ""),
        ("a", good, mask, "CT", "other", "tune"),
        ("g", good, mask, "", "organs", ""),
        ("h", good, mask, "CT"),
    ]
    return write_manifest(folder / "cases.csv", rows)


def test_all_bad_rows_are_listed_before_any_work(tmp_path):
    manifest = bad_rows(tmp_path)
    with pytest.raises(UserError) as error:
        building.build(request(manifest, tmp_path / "data"))
    lines = str(error.value).splitlines()
    expected = [
        "row 7: split 'test'",
        "row 10: modality is empty",
        "row 11: has 4 fields, the header 6",
        "row 8 (case a): case id, task organs and modality CT repeat row 2",
        "row 9 (case a): split tune, but row 2 puts the same case into train",
        "missing.nii.gz: does not exist",
        "cut.nii.gz: cannot be read",
        "empty.nrrd: the mask is empty",
        "flat.nrrd: the image is constant (7)",
        "9 rows cannot be used",
    ]
    for part, line in zip(expected, lines, strict=True):
        assert part in line
        assert line.startswith(str(manifest))
    assert not (tmp_path / "data").exists()


def test_bad_rows_can_be_skipped_and_are_recorded(tmp_path, capsys):
    manifest = bad_rows(tmp_path)
    building.build(request(manifest, tmp_path / "data", on_error="skip"))
    record = find_dataset(tmp_path / "data").record
    assert len(record["skipped_rows"]) == 9
    assert "row 4 (case c)" in " ".join(record["skipped_rows"])
    assert record["splits"]["train"]["cases"] == 1
    assert "row 4 (case c)" in capsys.readouterr().out


def test_the_same_image_under_two_names_is_reported(tmp_path, capsys):
    make_ct(tmp_path, "a")
    rows = [
        ("one", "a.nii.gz", "a_mask.nii.gz", "CT", "organs", "train"),
        ("two", "a.nii.gz", "a_mask.nii.gz", "CT", "organs", "tune"),
    ]
    building.build(request(write_manifest(tmp_path / "cases.csv", rows), tmp_path / "data"))
    line = "row 3 (case two): the same image as row 2 (case one), in different splits"
    assert line in capsys.readouterr().out
    assert line in find_dataset(tmp_path / "data").record["warnings"][0]


def test_further_annotators_are_named_and_left_to_the_evaluation(tmp_path, capsys):
    make_ct(tmp_path, "a")
    rows = [("a", "a.nii.gz", "a_mask.nii.gz", "CT", "t", "train", "not_there.nii.gz")]
    header = "case_id,image,mask,modality,task,split,mask_reader2"
    manifest = write_manifest(tmp_path / "cases.csv", rows, header)
    building.build(request(manifest, tmp_path / "data"))
    line = "mask_reader2: further annotators are not stored"
    assert line in capsys.readouterr().out
    assert line in find_dataset(tmp_path / "data").record["warnings"][-1]
    assert len(records(tmp_path / "data", "train")) == 6


def test_a_windowed_ct_is_pointed_out(tmp_path, capsys):
    make_ct(tmp_path, "a")
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    write_volume(tmp_path / "a.nii.gz", np.clip(array + 1000, 0, 255).astype(np.int16))
    rows = [("one", "a.nii.gz", "a_mask.nii.gz", "CT", "organs", "train")]
    building.build(request(write_manifest(tmp_path / "cases.csv", rows), tmp_path / "data"))
    assert "probably not in HU" in capsys.readouterr().out


def test_nothing_left_is_an_error(tmp_path):
    make_ct(tmp_path, "a")
    labels = np.zeros((8, SIDE, SIDE), np.uint8)
    labels[0, 0, 0] = 1
    write_volume(tmp_path / "a_mask.nii.gz", labels)
    rows = [("one", "a.nii.gz", "a_mask.nii.gz", "CT", "organs", "train")]
    manifest = write_manifest(tmp_path / "cases.csv", rows)
    with pytest.raises(UserError, match="no slice is left"):
        building.build(request(manifest, tmp_path / "data"))
    assert not (tmp_path / "data" / "medical_slices").exists()
