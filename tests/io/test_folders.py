"""Contents of a folder: images, DICOM under any name, and what is named as left out."""

import os

import numpy as np
import pytest

from medsam_jax.io.folders import search

DICOM = b"\0" * 128 + b"DICM" + b"\0" * 20


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(folder, contents):
    files = [str(file.relative_to(folder)) for file in contents.files]
    dicom = {
        str(place.relative_to(folder)): [file.name for file in found]
        for place, found in contents.dicom.items()
    }
    return files, dicom, [line.removeprefix(f"{folder}/") for line in contents.left_out]


def test_images_are_found_and_others_are_named(tmp_path):
    files = {
        "b.png": b"x",
        "a.nii.gz": b"x",
        "p/IM1": DICOM,
        "p/1.2.840.99": DICOM,
        "p/2.dcm": b"x",
        "DICOMDIR": DICOM,
        "scan.nii.zip": b"PK\0\0",
        "scan.mat": b"MATLAB 5.0\0\1IM",
        "scan.h5": b"\x89HDF\0",
        "lost.img": b"\0\1",
        "pair.hdr": b"\0" * 344 + b"ni1\0",
        "pair.img": b"\0\1",
        "nameless": b"\0" * 344 + b"n+1\0",
        "v.mhd": b"x",
        "v.raw": b"\0",
    }
    fill(tmp_path, **files)
    found, dicom, left_out = names(tmp_path, search(tmp_path))
    assert found == ["a.nii.gz", "b.png", "nameless", "pair.hdr", "v.mhd"]
    assert dicom == {"p": ["1.2.840.99", "2.dcm", "IM1"]}
    starts = ["DICOMDIR: an index of DICOM files", "lost.img: has no .hdr file beside it"]
    starts += [f"scan{suffix} is no format" for suffix in (".h5: .h5", ".mat: .mat")]
    starts += ["scan.nii.zip: .zip is no format"]
    assert len(left_out) == len(starts)
    assert all(line.startswith(start) for line, start in zip(left_out, starts, strict=True))


def test_hidden_files_and_texts_are_left_out_silently(tmp_path):
    silent = ("._a.nii.gz", ".hidden/b.png", "__MACOSX/c.png", "Thumbs.db", "README", "notes.txt")
    fill(tmp_path, **dict.fromkeys(silent, b"text"), **{"report.pdf": b"%PDF\0"})
    assert names(tmp_path, search(tmp_path)) == ([], {}, [])


def test_linked_folders_are_entered_under_the_names_given(tmp_path):
    fill(tmp_path, **{"store/7f3a/scan.png": b"x", "scans/own.png": b"x"})
    os.symlink(tmp_path / "store" / "7f3a", tmp_path / "scans" / "patient 1")
    os.symlink(tmp_path / "scans", tmp_path / "scans" / "again")  # a circle
    found, _, _ = names(tmp_path / "scans", search(tmp_path / "scans"))
    assert found == ["own.png", "patient 1/scan.png"]


@pytest.mark.parametrize("name", ["a [b]*", "c#d?", "e\nf", "g é", '"h"'])
def test_any_name(tmp_path, name):
    fill(tmp_path / name, **{f"{name}.png": np.zeros(3).tobytes()})
    assert [file.name for file in search(tmp_path / name).files] == [f"{name}.png"]
    assert search(tmp_path, deep=False).files == []
