"""`datasets.inspect`: a file, a mask, a picture, DICOM series, refusals, folders; its pictures."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from datasets import inspection, inspection_figure
from medsam_jax.io.geometry import Scan
from medsam_jax.io.notes import log_notes, summarise_notes
from tests.io.dicom_files import DEFLATED, write_slice
from tests.io.test_scans import write, write_series


def ct(path, low=-1000):
    array = np.full((4, 20, 10), low, np.int16)
    array[:, 5:15, 2:8] = 40
    array[1:3, 8:12, 4:6] = 100
    return write(path, array, spacing=(0.8, 0.5, 3.0))


def liver(path):
    labels = np.zeros((4, 20, 10), np.uint8)
    labels[1:3, 8:12, 4:6] = 2
    return write(path, labels, spacing=(0.8, 0.5, 3.0))


def run(*arguments):
    command = [sys.executable, "-m", "datasets.inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_a_file_and_its_mask(tmp_path):
    found = inspection.describe(
        str(ct(tmp_path / "ct.nii.gz")), str(liver(tmp_path / "m.nii.gz"))
    ).description
    assert found.format == "NIfTI, compressed by gzip"
    assert found.size == (10, 20, 4)
    assert found.spacing_text() == "0.8 x 0.5 x 3 mm"
    assert (found.orientation, found.slice_axis, found.plane) == ("LPS", "z", "axial")
    assert (found.dtype, found.value_range[0], found.value_range[-1]) == ("int16", -1000, 100)
    assert found.modality == "CT"
    assert "guess" in found.modality_source
    assert found.labels == {2: {"voxels": 16, "slices": 2, "ml": pytest.approx(16 * 1.2e-3)}}
    assert found.refused == ""


@pytest.mark.parametrize(
    ("columns", "letters", "plane", "tilt"),
    [
        (np.eye(3), "LPS", "axial", 0),
        (np.diag([-1, 1, -1]), "RPI", "axial", 0),
        (np.eye(3)[:, [1, 2, 0]], "PSL", "sagittal", 0),
        (np.eye(3)[:, [0, 2, 1]] * [1, -1, 1], "LIP", "coronal", 0),
        ([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]], "LPS", "axial", 36.87),
    ],
)
def test_orientation(columns, letters, plane, tilt):
    affine = ((0.0,) * 3, (1.0, 1.0, 3.0), tuple(np.ravel(columns).astype(float).tolist()))
    scan = Scan(np.zeros((4, 5, 6)), (3.0, 1.0, 1.0), affine, "a")
    assert inspection.orientation(scan, 0) == (letters, plane, pytest.approx(tilt, abs=0.01))


def test_ct_that_cannot_be_in_hounsfield_units(tmp_path):
    path = str(ct(tmp_path / "ct.nii", low=0))
    assert "probably not in HU" in inspection.describe(path, modality="CT").description.warnings[0]
    assert inspection.describe(path, modality="MR").description.warnings == ()


def test_the_modality_of_a_deflated_dicom_file(tmp_path):
    write_slice(tmp_path / "a", np.arange(48, dtype=np.int16).reshape(6, 8), syntax=DEFLATED)
    found = inspection.describe(str(tmp_path / "a")).description
    assert (found.format, found.modality) == ("DICOM", "MR")


def test_values_that_a_build_refuses(tmp_path):
    for low, words in ((7, "constant image (7)"), (0, "percentiles are both 7")):
        array = np.full((4, 6, 8), 7, np.int16)
        array[0] = low
        path = write(tmp_path / "a.nrrd", array)
        warnings = inspection.describe(str(path), modality="MR").description.warnings
        assert any(words in line for line in warnings), warnings


def test_a_picture_has_no_millimetres(tmp_path):
    Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(tmp_path / "a.png")
    found = inspection.describe(str(tmp_path / "a.png")).description
    assert found.spacing_text() == "not stated: results are in pixels"
    assert (found.size, found.orientation, found.slices) == ((30, 20, 1), "", 1)


def test_a_spacing_that_is_stated_for_some_axes(tmp_path):
    ct(tmp_path / "a.mha")
    content = (tmp_path / "a.mha").read_bytes()
    without = re.sub(rb"ElementSpacing = .*\n", b"", content)
    assert without != content
    (tmp_path / "a.mha").write_bytes(without)
    inspected = inspection.describe(str(tmp_path / "a.mha"))
    assert inspected.description.spacing_mm == (None, None, None)
    assert inspected.description.notes
    assert "evaluate refuses" in inspected.description.warnings[-1]
    inspection_figure.draw(inspected)


def test_the_format_is_what_the_bytes_say(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.nii")
    assert inspection.format_of(str(tmp_path / "b.nii")) == "PNG"
    (tmp_path / "c.nrrd").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS" in inspection.format_of(str(tmp_path / "c.nrrd"))
    for name in ("d.nrrd", "d.mha", "d.nii"):
        kind = {"nrrd": "NRRD", "mha": "MetaImage", "nii": "NIfTI"}[name[2:]]
        assert inspection.format_of(str(ct(tmp_path / name))) == kind


def test_command_line_on_a_folder(tmp_path):
    """Two series, a scan, a refused file and one that is no scan; all of them are named."""
    folder = tmp_path / "scans"
    folder.mkdir()
    ct(folder / "ct.nii.gz")
    (folder / "bad.nii").write_bytes(b"GIF89a not a scan")
    (folder / "a.mat").write_bytes(b"no\0scan")
    for uid, depth in (("1.2.3.4", 4), ("1.2.3.5", 3)):
        write_series(folder / "dicom", np.ones((depth, 6, 8), np.int16), uid)
    done = run(folder, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr == f"error: {folder}: 1 of 4 scans are refused, named above\n"
    assert f"{folder}/dicom#1.2.3.4\n  format:      DICOM series" in done.stdout
    assert f"refused:     {folder}/bad.nii: " in done.stdout
    assert "4 scans, 1 refused" in done.stdout
    assert f"left out:    {folder}/a.mat: .mat is no format" in done.stdout
    assert "CT (the file's DICOM tag)" in done.stdout
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["ct.png", "dicom_1.2.3.4.png", "dicom_1.2.3.5.png"]


def test_json_and_the_exit_status_of_one_file(tmp_path):
    done = run(ct(tmp_path / "ct.nrrd"), "--json", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["size"], found["spacing_mm"], found["plane"]) == (
        [10, 20, 4],
        [0.8, 0.5, 3.0],
        "axial",
    )
    (tmp_path / "no.png").write_bytes(b"no picture")
    done = run(tmp_path / "no.png", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/no.png: ")
    assert done.stderr.count("\n") == 1


def test_a_checkpoint_directory_is_one_line(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    assert "is a checkpoint directory" in inspection.other_folder(str(tmp_path))
    assert inspection.other_folder(str(tmp_path / "no")) is None


def test_planes_have_the_aspect_of_the_spacing_and_letters(tmp_path):
    """Coronal and sagittal planes have the head at the top; the stored z axis runs to the feet."""
    array = np.zeros((4, 20, 10), np.int16)
    array[0] = 100  # at the head
    path = write(
        tmp_path / "a.nrrd", array, (0.8, 0.5, 3.0), direction=(1, 0, 0, 0, -1, 0, 0, 0, -1)
    )
    labels = write(
        tmp_path / "m.nrrd",
        (array > 0).astype(np.uint8),
        (0.8, 0.5, 3.0),
        direction=(1, 0, 0, 0, -1, 0, 0, 0, -1),
    )
    inspected = inspection.describe(str(path), str(labels))
    axial, coronal, sagittal, _ = inspection_figure.draw(inspected).axes
    assert [panel.get_aspect() for panel in (axial, coronal, sagittal)] == pytest.approx(
        [0.5 / 0.8, 3.0 / 0.8, 3.0 / 0.5]
    )
    letters = [[text.get_text() for text in panel.texts] for panel in (axial, coronal, sagittal)]
    assert letters == [list("PARL"), list("SIRL"), list("SIPA")]
    assert axial.get_title().startswith("z = 0 of 4")  # where the mask is
    assert coronal.images[0].get_array()[0].min() == 1.0  # the bright slice is at the top


def test_pictures_of_one_name_do_not_replace_each_other(tmp_path):
    scans = [str(tmp_path / name) for name in ("a/ct.nii", "a/ct_2.nii", "b/ct.nii", "b/CT.nrrd")]
    names = inspection.picture_names(scans)
    assert list(names.values()) == ["ct.png", "ct_2.png", "ct_3.png", "CT_4.png"]


# --- notes


def noted(path, *notes):
    return Scan(np.zeros((1, 2, 2)), (1.0, 1.0, 1.0), None, path, notes)


def test_notes_are_logged_once(caplog):
    for _ in range(2):
        log_notes(noted("once.dcm", "positions are rounded", "frames were sorted"))
    assert [record.getMessage() for record in caplog.records] == [
        "once.dcm: positions are rounded",
        "once.dcm: frames were sorted",
    ]


def test_notes_of_many_scans_are_counted():
    many = [(f"p{index}", ("tilted",)) for index in range(9)]
    lines = summarise_notes([("p0", ("alone",)), *many, ("p1", ("tilted",))], names=2)
    assert lines == ["p0, p1 and 7 more: tilted", "p0: alone"]
    lines = summarise_notes([("p0", [f"note {index}" for index in range(9)])], lines=3)
    assert len(lines) == 4
    assert lines[-1] == "6 further notes"


def test_notes_of_a_mask_are_marked(tmp_path):
    """The mask covers a part of the image on a grid of its own."""
    image = str(ct(tmp_path / "ct.nii.gz"))
    labels = np.ones((4, 10, 10), np.uint8)
    mask = write(tmp_path / "m.nii.gz", labels, (0.8, 0.5, 3.0), origin=(1.0, 0.5, 5.0))
    notes = inspection.describe(image, str(mask)).description.notes
    assert len(notes) == 1
    assert notes[0].startswith("mask: The mask is on another grid")


def test_notes_reach_the_record_and_the_card(hospital, tmp_path, monkeypatch, capsys):
    """No file of the hospital has a note, so the reader's scans get one."""
    import dataclasses

    from datasets.medical_slices import building, card, slices
    from medsam_jax.data.datasets import find_dataset

    read = slices.read_scan
    monkeypatch.setattr(
        slices, "read_scan", lambda path: dataclasses.replace(read(path), notes=("tilted",))
    )
    monkeypatch.setattr(building.card, "draw", lambda *_: [])
    building.build(building.Request(str(hospital), str(tmp_path), slices.Options(recipe="lite")))
    record = find_dataset(tmp_path).record
    assert {tuple(case["notes"]) for case in record["cases"]} == {("tilted",)}
    assert "note: " in capsys.readouterr().out
    text = card.text(record)
    cases = list(dict.fromkeys(case["case_id"] for case in record["cases"]))
    line = f"{', '.join(cases[:3])} and {len(cases) - 3} more: tilted"
    assert f"## Notes on how files were read\n\n* {line}\n" in text
