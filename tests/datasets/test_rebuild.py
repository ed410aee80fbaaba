"""The manifest and the report of a build, and building again."""

import pytest

from datasets.medical_slices import building
from medsam_jax.data.datasets import data_set_of, find_dataset
from medsam_jax.data.manifest import read_cases
from medsam_jax.data.splits import split_of
from medsam_jax.errors import UserError
from tests.datasets.scans import write_manifest
from tests.datasets.test_build import request


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    """Drawing takes longer than building here."""
    monkeypatch.setattr(building.card, "write", lambda *_: None)


def test_the_manifest_beside_the_data_fixes_the_splits(hospital, tmp_path):
    """It works from there, keeps every column, and a data set built from it has the same splits."""
    names = [n for n in map("p{}".format, range(99)) if split_of("liver", n) == "train"][:4]
    rows = [(name, "us0.png", "us0_mask.png", "US", "mass", "", "7") for name in names]
    header = "case_id,image,mask,modality,task,window,ignore"
    path = write_manifest(hospital.parent / "few.csv", rows, header)
    directory = building.build(request(path, tmp_path / "a", name="liver"))
    built = {case["case_id"]: case["split"] for case in find_dataset(directory).record["cases"]}
    assert sorted(built.values()) == ["train", "train", "tune", "validation"]
    beside = read_cases(directory / "cases.csv")
    assert {case.case_id: case.split for case in beside} == built
    assert [case.image for case in beside] == [str(hospital.parent / "us0.png")] * 4
    assert [case.ignore for case in beside] == [(7,)] * 4
    assert {case.case_id: case.split for case in read_cases(path, None, "liver")} == built
    assert data_set_of(directory / "cases.csv") == "liver"
    text = building.report(directory, "my data")
    assert "train               2        2        2" in text
    assert str(directory / "cases.csv") in text
    assert "next: python -m medsam_jax.train --config configs/lite_medsam.py" in text
    assert text.endswith("--config.data_dir='my data'")


def test_a_data_set_is_replaced_when_the_new_one_is_whole(hospital, tmp_path, monkeypatch):
    directory = building.build(request(hospital, tmp_path))
    before = find_dataset(tmp_path).record
    few = write_manifest(
        hospital.parent / "one.csv", [("u0", "us0.png", "us0_mask.png", "US", "mass", "train")]
    )

    def fail(*_):
        assert find_dataset(tmp_path).record == before
        raise UserError("stopped")

    for killed_between_the_renames in (False, True):
        if killed_between_the_renames:
            caught = tmp_path / ".building-medical_slices-lite" / "old"
            caught.parent.mkdir()
            directory.rename(caught)
        with monkeypatch.context() as patch:
            patch.setattr(building.card, "write", fail)
            with pytest.raises(UserError, match="stopped"):
                building.build(request(few, tmp_path, overwrite=True))
        assert find_dataset(tmp_path).record == before
    building.build(request(few, tmp_path, overwrite=True))
    assert [case["case_id"] for case in find_dataset(tmp_path).record["cases"]] == ["u0"]
    assert [path.name for path in tmp_path.iterdir()] == ["medical_slices"]
