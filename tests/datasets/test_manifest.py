"""Making a manifest from folders."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from datasets.medical_slices import nnunet, pairing
from medsam_jax.data.manifest import read_cases, read_manifest
from medsam_jax.data.recipes import DEFAULT_RECIPE, PREPROCESSING
from medsam_jax.errors import UserError
from medsam_jax.io.scans import read_mask, read_scan
from medsam_jax.training.config import base_config
from tests.datasets.scans import make_mr
from tests.io.test_scans import write_series
from weights_converter.registry import REGISTRY


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_files_are_paired_by_what_their_names_share(tmp_path):
    touch(tmp_path, "img/case_01_0000.nii.gz", "img/case_02_0000.nii.gz", "img/case_9_0000.nii.gz")
    touch(tmp_path, "seg/case_01.nii.gz", "seg/case-02_seg.nii.gz", "seg/case_08.nii.gz")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CT", "liver")
    assert [
        (row[0], pathlib.Path(row[1]).name, pathlib.Path(row[2]).name) for row in found.rows
    ] == [
        ("case_01", "case_01_0000.nii.gz", "case_01.nii.gz"),
        ("case_02", "case_02_0000.nii.gz", "case-02_seg.nii.gz"),
    ]
    assert {row[3:] for row in found.rows} == {("CT", "liver")}
    image, mask = found.problems[1], found.problems[0]
    assert "case_08.nii.gz: no image named like it" in mask
    assert "case_9_0000.nii.gz: no mask named like it (nearest: 'case_0" in image


def test_one_folder_with_a_folder_for_each_patient(tmp_path):
    touch(tmp_path, "A/image.nrrd", "A/mask.nrrd", "B/image.nrrd", "B/mask.nrrd", "C/notes.txt")
    touch(tmp_path, "imagery/1.png", "imagery/1_mask.png")
    found = pairing.pair_folders(tmp_path, tmp_path, "MR", "t")
    assert [row[0] for row in found.rows] == ["A", "B", "imagery_1"]
    assert not found.problems


def test_names_that_several_files_share_are_reported(tmp_path):
    touch(tmp_path, "img/a.png", "img/a.nii", "seg/a.png")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CT", "t")
    assert not found.rows
    assert "several files share the name 'a'" in found.problems[0]


def test_a_dicom_folder_is_one_scan(tmp_path):
    touch(tmp_path, "img/p1/001.dcm", "img/p1/002.dcm", "seg/p1.nii.gz")
    (tmp_path / "img/p2").mkdir()
    (tmp_path / "img/p2/IM1").write_bytes(b"\0" * 128 + b"DICM")
    touch(tmp_path, "seg/p2.nii.gz")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CT", "t")
    assert [(row[0], row[1]) for row in found.rows] == [
        ("p1", str(tmp_path / "img/p1")),
        ("p2", str(tmp_path / "img/p2")),
    ]


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet_folders(tmp_path, version):
    described = (
        {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "2": "tumour"}}
        if version == 1
        else {
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": {"background": 0, "tumour": 2, "whole": [1, 2]},
            "file_ending": ".nii.gz",
        }
    )
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    touch(tmp_path, "imagesTr/a_b_0000.nii.gz", "imagesTr/a_b_0001.nii.gz", "labelsTr/a_b.nii.gz")
    touch(tmp_path, "imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz", "imagesTr/d_0000.nii.gz")
    found = nnunet.read_nnunet(tmp_path, "brain")
    assert [(row[0], row[3], row[4]) for row in found.rows] == [
        ("a_b", "T1", "brain"),
        ("a_b", "T2", "brain"),
        ("c", "T1", "brain"),
    ]
    assert found.notes == ["labels: --labels=2=tumour"]
    assert [pathlib.Path(line.split(":")[0]).name for line in found.problems] == [
        "c_0001.nii.gz",
        "d_0000.nii.gz",
    ]


def test_medsam_npz_folder(tmp_path):
    np.savez(
        tmp_path / "x.npz", imgs=np.ones((2, 4, 4), np.uint8), gts=np.eye(4)[None].repeat(2, 0)
    )
    found = pairing.read_npz(tmp_path, "CT", "t")
    assert found.rows == [("x", *[str(tmp_path / "x.npz")] * 2, "CT", "t")]
    scan = read_scan(found.rows[0][1])
    assert read_mask(found.rows[0][2], scan).sum() == 8


def test_what_is_written_is_read_back(tmp_path):
    rows = [("a, b", str(tmp_path / "x" / "i.nii"), str(tmp_path / "m.nii"), "CT", "t")]
    pairing.write_manifest(tmp_path / "cases.csv", rows)
    assert "a, b" in (tmp_path / "cases.csv").read_text()
    (found,), problems = read_manifest(tmp_path / "cases.csv")
    assert not problems
    assert (found.image, found.mask) == rows[0][1:3]
    with pytest.raises(UserError, match="is there already"):
        pairing.write_manifest(tmp_path / "cases.csv", rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: pairing.pair_folders(path / "no", path, "CT", "t"), "not a folder"),
        (lambda path: pairing.pair_folders(path, path, "CT", "t"), "holds no file"),
        (lambda path: nnunet.read_nnunet(path, "t"), "dataset.json: does not exist"),
    ],
)
def test_unusable_folders(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def run(module, *flags):
    command = [sys.executable, "-m", f"datasets.{module}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_a_command_line_that_fails_ends_in_one_line_and_status_1(tmp_path):
    done = run("build", "--manifest", tmp_path / "no.csv", "--data_dir", tmp_path / "d")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_from_a_folder_to_a_data_card_by_command_line(tmp_path):
    make_mr(tmp_path, "knæ")
    manifest, data, out = tmp_path / "cases.csv", tmp_path / "data", tmp_path / "card"
    folders = ("--images", tmp_path, "--masks", tmp_path)
    done = run("manifest", *folders, "--modality=MR", "--task=t", "--output", manifest)
    assert done.returncode == 0, done.stderr
    assert "1 cases, 0 files not paired" in done.stdout
    done = run("build", "--manifest", manifest, "--data_dir", data)
    assert done.returncode == 0, done.stderr
    assert f"built {data}/medical_slices/lite/1.0.0" in done.stdout
    done = run("inspect", "--data_dir", data, "--output", out)
    assert done.returncode == 0, done.stderr
    built = data / "medical_slices/lite/1.0.0/README.md"
    assert (out / "README.md").read_text(encoding="utf-8") == built.read_text(encoding="utf-8")
    assert built.read_text(encoding="utf-8") in done.stdout


def test_the_default_recipe_is_that_of_the_checkpoint_that_training_starts_from():
    known = REGISTRY[base_config().checkpoint]
    assert PREPROCESSING[known.preprocessing].recipe == DEFAULT_RECIPE


def test_what_is_no_image_is_named(tmp_path):
    touch(tmp_path, "img/a.png", "seg/a.png", "img/notes.txt", "img/._a.png")
    (tmp_path / "img" / "b.h5").write_bytes(b"\x89HDF\0")
    (tmp_path / "img" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CT", "t")
    assert [row[0] for row in found.rows] == ["a"]
    starts = ("DICOMDIR: an index", "b.h5: .h5 is no format")
    for line, start in zip(found.problems, starts, strict=True):
        assert line.startswith(f"{tmp_path}/img/{start}")


def test_slices_of_a_series_in_the_folder_itself_are_no_scans(tmp_path):
    write_series(tmp_path / "img", np.ones((3, 8, 8), np.int16), "1.2.3")
    touch(tmp_path, "seg/a.png", "img/a.png")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CT", "t")
    assert [row[0] for row in found.rows] == ["a"]
    (line,) = found.problems
    assert "3 DICOM files lie beside each other; give each series a folder of its own" in line


def test_single_dicom_files_are_images(tmp_path):
    for name in ("1.2.3", "1.2.4"):
        write_series(tmp_path / "img", np.ones((1, 8, 8), np.int16), name)
    touch(tmp_path, "seg/1.2.3-0.png", "seg/1.2.4-0.png")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CR", "t")
    assert [pathlib.Path(row[1]).name for row in found.rows] == ["1.2.3-0.dcm", "1.2.4-0.dcm"]
    assert not found.problems


@pytest.mark.parametrize("name", [" a", "a ", "x#1", "[1]*", "n\nl", "\u00e9, b"])
def test_any_folder_is_written_so_that_it_is_read(tmp_path, name):
    touch(tmp_path, f"img/{name}/001.dcm", f"seg/{name}.png")
    found = pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CT", "t")
    pairing.write_manifest(tmp_path / "cases.csv", found.rows)
    (case,) = read_cases(tmp_path / "cases.csv")
    assert case.image == str(tmp_path / "img" / name)


def test_composed_and_decomposed_letters_are_the_same(tmp_path):
    touch(tmp_path, "img/\u00e9.png", "seg/e\u0301.png")
    assert len(pairing.pair_folders(tmp_path / "img", tmp_path / "seg", "CT", "t").rows) == 1


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    done = run("manifest", "--nnunet", tmp_path, "--output", tmp_path / "file" / "x.csv")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/file: cannot be written ({tmp_path}/file is a file); choose another "
        "folder\n"
    )
