"""Scans of one patient share a case id; modalities come from the files where these say theirs."""

import csv
import json
import pathlib

import numpy as np
import pydicom
import pytest

from datasets.medical_slices import nnunet, pairing
from tests.datasets.test_manifest import run, touch
from tests.io.test_scans import write_series


def pairs(folder, *names):
    """Makes images and masks of those names and returns what is found."""
    touch(folder, *(f"img/{name}" for name in names), *(f"seg/{name}" for name in names))
    return pairing.pair_folders(folder / "img", folder / "seg", "MR", "liver")


def cases(found):
    return [(row[0], row[3], row[4]) for row in found.rows]


def test_a_folder_that_holds_pairs_is_a_patient(tmp_path):
    found = pairs(tmp_path, "p1/ct.nii", "p1/mr.nii", "p2/ct.nii", "p2/mr.nii", "p3/mr.nii")
    assert cases(found) == [
        *(("p1", "CT", "liver"), ("p1", "MR", "liver")),
        *(("p2", "CT", "liver"), ("p2", "MR", "liver")),
        ("p3", "MR", "liver"),
    ]
    assert found.notes == [
        "5 scans of 3 patients: a patient's share a split",
        "modality of 2 scans: CT, by the file's name (not MR)",
    ]
    assert not found.warnings


def test_sequences_tell_scans_of_a_patient_apart(tmp_path):
    found = pairs(
        tmp_path, "scan_7/t1.nii", "scan_7/flair.nii", "scan_8/t1.nii", "scan_8/flair.nii"
    )
    assert cases(found) == [
        (patient, modality, "liver") for patient in "78" for modality in ("MR FLAIR", "MR T1")
    ]


def test_scans_of_one_modality_become_tasks(tmp_path):
    found = pairs(tmp_path, *(f"p{n}/visit_{visit}.nii" for n in (1, 2, 3) for visit in (1, 2)))
    assert cases(found) == [
        (f"p{n}", "MR", task) for n in (1, 2, 3) for task in ("liver", "liver 2")
    ]
    assert "p1/visit_2.nii: patient p1 has MR already; this scan is task liver 2" in found.notes[1]


def test_a_folder_of_many_patients_is_none(tmp_path):
    names = [f"{site}/p{n}.nii" for site in ("a", "b") for n in range(4)]
    assert [row[0] for row in pairs(tmp_path, *names).rows] == [
        f"{site}_p{n}" for site in ("a", "b") for n in range(4)
    ]


@pytest.mark.parametrize(
    ("names", "doubtful"),
    [
        (["p1_ct.nii", "p1_mr.nii", "p2_ct.nii"], ["p1_ct, p1_mr"]),
        (["CT/p1.nii", "MR/p1.nii"], ["CT_p1, MR_p1"]),
        (["smith_1.nii", "smith_2.nii", "jones_1.nii"], ["smith_1, smith_2"]),
        (["a_pre.nii", "a_post.nii"], ["a_post, a_pre"]),
        ([f"case_{n}.nii" for n in range(5)], []),
        (["case1.nii", "case2.nii", "b_101.nii", "b_102.nii"], []),
    ],
)
def test_names_that_may_be_of_one_patient_are_warned_of(tmp_path, names, doubtful):
    found = pairs(tmp_path, *names)
    assert len({row[0] for row in found.rows}) == len(names)
    assert [line.partition(": ")[2].partition(";")[0] for line in found.warnings] == doubtful
    assert all(line.startswith("these may be one patient: ") for line in found.warnings)


@pytest.mark.parametrize("source", ["npz", "nnunet"])
def test_names_of_other_folders_are_warned_of_too(tmp_path, source):
    names = ["smith_1", "smith_2", "jones_1"]
    if source == "npz":
        touch(tmp_path, *(f"{name}.npz" for name in names))
        found = pairing.read_npz(tmp_path, "CT", "t")
    else:
        (tmp_path / "dataset.json").write_text(
            json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "labels": {"tumour": 1}})
        )
        for name in names:
            images = (f"imagesTr/{name}_{channel:04d}.nii.gz" for channel in range(2))
            touch(tmp_path, *images, f"labelsTr/{name}.nii.gz")
        found = nnunet.read_nnunet(tmp_path, "t")
    assert {row[0] for row in found.rows} == set(names)
    (warning,) = found.warnings
    assert warning.startswith("these may be one patient: smith_1, smith_2; if so, give them one")


def series(folder, name, patient, modality):
    """A DICOM folder `img/NAME` of one patient, with its mask."""
    (folder / "img" / name).mkdir(parents=True)
    write_series(folder / "img" / name, np.ones((2, 8, 8), np.int16), f"1.2.{len(name)}")
    for file in (folder / "img" / name).iterdir():
        dataset = pydicom.dcmread(file)
        dataset.PatientID, dataset.Modality = patient, modality
        dataset.save_as(file)
    touch(folder, f"seg/{name}.nii")


def test_dicom_says_patient_and_modality(tmp_path):
    series(tmp_path, "s1", "Smith^7", "CT")
    series(tmp_path, "s2", "Smith^7", "MR")
    series(tmp_path, "s30", "Jones", "CT")
    touch(tmp_path, "img/other.nii", "seg/other.nii")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "", "liver")
    names = {pathlib.Path(row[1]).name: (row[0], row[3]) for row in found.rows}
    expected = {"s1": ("Smith^7", "CT"), "s2": ("Smith^7", "MR"), "s30": ("Jones", "CT")}
    assert names == expected | {"other.nii": ("other", "")}
    folders = ("--images", tmp_path / "img", "--masks", tmp_path / "seg", "--task=liver")
    output = tmp_path / "cases.csv"
    done = run("manifest", *folders, "--output", output)
    assert done.returncode == 1
    assert "other.nii: does not say its modality; give e.g. --modality CT" in done.stderr
    assert not output.exists()
    done = run("manifest", *folders, "--modality=PET", "--output", output)
    assert "4 scans of 3 patients" in done.stdout
    assert "modality of 2 scans: CT, by DICOM's tag (not PET)" in done.stdout
    with output.open() as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert rows["img/s2"]["case_id"] == "Smith^7"
    assert rows["img/other.nii"]["modality"] == "PET"


def test_a_folder_takes_its_dicom_scans_patient_id(tmp_path):
    series(tmp_path, "p1/ct", "Smith", "CT")
    series(tmp_path, "p2/ct1", "Jones", "CT")
    touch(tmp_path, *(f"{side}/p{n}/mr.nii" for side in ("img", "seg") for n in (1, 2)))
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "MR", "liver")
    assert sorted((row[0], row[3]) for row in found.rows) == [
        *(("Jones", "CT"), ("Jones", "MR"), ("Smith", "CT"), ("Smith", "MR"))
    ]


def test_one_patient_id_for_all_is_a_placeholder(tmp_path):
    for name in ("a1", "b22", "c333"):
        series(tmp_path, name, "ANON", "CT")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "", "liver")
    assert [row[0] for row in found.rows] == ["a1", "b22", "c333"]
    assert "all 3 scans have the PatientID 'ANON'" in found.warnings[0]
