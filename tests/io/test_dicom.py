"""DICOM objects, files and folders: each file is read, or named with the reason."""

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from medsam_jax.errors import UserError
from medsam_jax.io.dicom import dicom_files, dicom_modality, list_series
from medsam_jax.io.scans import read_scan
from tests.io.dicom_files import write_slice
from tests.io.test_dicom_pixels import colours
from tests.io.test_dicom_series import refused as refusal
from tests.io.test_dicom_series import write as series

PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
SHAPE = (8, 13, 11)  # 143 pixels a plane, an odd number


def volume(shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def rewrite(path, change):
    """Changes a written file's data set."""
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)
    return path


OBJECTS = {
    "RT Structure Set": ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", "label map"),
    "RT Plan": ("1.2.840.10008.5.1.4.1.1.481.5", "RTPLAN", ""),
    "Comprehensive SR": ("1.2.840.10008.5.1.4.1.1.88.33", "SR", ""),
    "Presentation State": ("1.2.840.10008.5.1.4.1.1.11.1", "PR", ""),
    "Key Object": ("1.2.840.10008.5.1.4.1.1.88.59", "KO", ""),
    "PDF": ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", ""),
    "Waveform": ("1.2.840.10008.5.1.4.1.1.9.1.2", "ECG", ""),
    "Spatial Registration": ("1.2.840.10008.5.1.4.1.1.66.1", "REG", ""),
    "Raw Data": ("1.2.840.10008.5.1.4.1.1.66", "MR", ""),
    "Spectroscopy": ("1.2.840.10008.5.1.4.1.1.4.2", "MR", ""),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_without_an_image(tmp_path, name):
    sop, modality, remedy = OBJECTS[name]
    gone = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel")
    gone += ("PixelRepresentation", "PhotometricInterpretation", "PixelData", *PLANE)
    tags = dict.fromkeys(gone) | {"SOPClassUID": sop, "Modality": modality}
    for path in (tmp_path / "a.dcm", tmp_path / "folder" / "a.dcm"):
        text = refusal(write_slice(path, volume()[0], tags=tags))
        assert name.lower() in text.lower()
        assert remedy in text
    assert name.lower() in refusal(tmp_path / "folder").lower()
    folder = series(tmp_path / "ct", volume())
    write_slice(folder / "other.dcm", volume()[0], tags=tags)
    assert read_scan(folder).array.shape == SHAPE


def test_dicomdir(tmp_path):
    folder = series(tmp_path / "disc" / "PT0" / "SE0", volume())
    index = Dataset()
    index.file_meta = pydicom.dataset.FileMetaDataset()
    index.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    index.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    index.file_meta.MediaStorageSOPInstanceUID = "1.2.3.9"
    index.FileSetID, index.DirectoryRecordSequence = "DISC", Sequence([])
    index.save_as(tmp_path / "disc" / "DICOMDIR", enforce_file_format=True)
    assert "Directory" in refusal(tmp_path / "disc" / "DICOMDIR")
    assert str(folder) in refusal(tmp_path / "disc")
    (folder / "DICOMDIR").write_bytes((tmp_path / "disc" / "DICOMDIR").read_bytes())
    np.testing.assert_array_equal(read_scan(folder).array, volume())


def test_without_preamble(tmp_path):
    plain = write_slice(tmp_path / "a.dcm", volume()[0])
    content = plain.read_bytes()
    (tmp_path / "meta.dcm").write_bytes(content[132:])
    for implicit in (True, False):
        ds = Dataset()
        ds.update(pydicom.dcmread(plain))
        path = tmp_path / f"bare{implicit}"
        ds.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    for path in ("meta.dcm", "bareTrue", "bareFalse"):
        scan = read_scan(tmp_path / path)
        np.testing.assert_array_equal(scan.array[0], volume()[0])
        assert any("preamble" in note for note in scan.notes), path


def test_series_without_preambles_or_suffixes(tmp_path):
    folder = series(tmp_path / "a", volume())
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        file.unlink()
        (folder / f"IM{file.stem}").write_bytes(content[132:] if file.stem in "357" else content)
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.array, volume())
    assert len(dicom_files(str(folder))) == 8


def test_other_files_in_the_folder(tmp_path):
    folder = series(tmp_path / "a", volume())
    (folder / "notes.txt").write_text("a CT")
    (folder / ".DS_Store").write_bytes(b"\0\1")
    (folder / "._0.dcm").write_bytes(b"\0\5\x16\7")
    Image.fromarray(colours()).save(folder / "key.png")
    np.testing.assert_array_equal(read_scan(folder).array, volume())
    (folder / "9.dcm").write_bytes(b"<html>not found</html>" * 9)
    assert "9.dcm" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 60, 131, 200, 500, -1, -20])
@pytest.mark.parametrize("suffix", ["", ".dcm"])
def test_cut_files_are_named_under_any_name(tmp_path, kept, suffix):
    folder = series(tmp_path / "a", volume())
    for file in list(folder.iterdir()):
        file.rename(folder / f"{file.stem}{suffix}")
    file = folder / f"7{suffix}"
    file.write_bytes(file.read_bytes()[:kept])
    if suffix or kept == 0 or abs(kept) >= 132 or kept < 0:
        assert f"7{suffix}" in refusal(folder)


def test_a_folder_above_the_series_says_so(tmp_path):
    series(tmp_path / "patient" / "CT", volume())
    text = refusal(tmp_path / "patient")
    assert "CT" in text


def test_half_of_a_series_in_a_folder_below_is_noted(tmp_path):
    folder = series(tmp_path / "a", volume())
    (folder / "more").mkdir()
    for index in (4, 5, 6, 7):
        (folder / f"{index}.dcm").rename(folder / "more" / f"{index}.dcm")
    scan = read_scan(folder)
    assert scan.array.shape[0] == 4
    assert any("4 files of this series lie in more/" in note for note in scan.notes)


def test_modality_of_any_file(tmp_path):
    plain = write_slice(tmp_path / "a.dcm", volume()[0])
    (tmp_path / "bare").write_bytes(plain.read_bytes()[132:])
    assert dicom_modality(str(tmp_path / "bare")) == "MR"
    assert dicom_modality(str(series(tmp_path / "b", volume(), tags={"Modality": None}))) == ""


def test_unreadable_file_is_named(tmp_path):
    folder = series(tmp_path / "a", volume())
    (folder / "link.dcm").symlink_to(tmp_path / "gone.dcm")
    assert "link.dcm" in refusal(folder)


def test_two_series_one_of_them_damaged(tmp_path):
    folder = series(tmp_path / "a", volume(), uid="1.5")
    for index, plane in enumerate(volume()):
        write_slice(folder / f"b{index}.dcm", plane, (0, 0, 3.0 * index), uid="1.6", number=index)
    (folder / "b7.dcm").write_bytes((folder / "b7.dcm").read_bytes()[:-50])
    assert read_scan(f"{folder}#1.5").array.shape == SHAPE
    with pytest.raises(UserError, match=r"b7\.dcm"):
        read_scan(f"{folder}#1.6")
    assert set(list_series(folder)) == {"1.5", "1.6"}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_series_in_other_transfer_syntaxes(tmp_path, syntax):
    array = volume() - 100
    folder = tmp_path / "a"
    for index, plane in enumerate(array):
        path = write_slice(folder / f"{index}.dcm", plane, (0, 0, 3.0 * index), number=index)
        ds = Dataset()
        ds.update(pydicom.dcmread(path))
        ds.file_meta = pydicom.dcmread(path).file_meta
        ds.file_meta.TransferSyntaxUID = syntax
        is_big = syntax == ExplicitVRBigEndian
        if is_big:
            ds.PixelData = plane.astype(">i2").tobytes() + b"\0" * (plane.nbytes % 2)
        is_implicit = syntax == ImplicitVRLittleEndian
        ds.save_as(path, implicit_vr=is_implicit, little_endian=not is_big)
    np.testing.assert_array_equal(read_scan(folder).array, array)


def test_halved_chrominance(tmp_path):
    ybr = to_ybr(np.repeat(colours((13, 5)), 2, axis=1))  # pairs of equal pixels
    packed = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1)
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0}
    tags |= {"PhotometricInterpretation": "YBR_FULL_422", "Rows": 13, "Columns": 10}
    path = write_slice(tmp_path / "a.dcm", packed.reshape(13, 20), tags=tags)
    found = read_scan(path).array[0].astype(int)
    assert np.abs(found - np.repeat(colours((13, 5)), 2, axis=1)).max() <= 3


def to_ybr(rgb):
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


def test_one_bit_a_pixel(tmp_path):
    bits = np.random.default_rng(0).random((13, 10)) > 0.5
    packed = np.packbits(bits.ravel(), bitorder="little")
    tags = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "Rows": 13, "Columns": 10}
    path = write_slice(tmp_path / "a.dcm", packed[None], tags=tags)
    assert "8 or 16 bits" in refusal(path)


@pytest.mark.parametrize("value", ["0", "", "1\\2"])
def test_slope_that_is_none(tmp_path, value):
    path = write_slice(tmp_path / "a.dcm", volume()[0])

    def change(ds):
        ds.RescaleIntercept = "0"
        ds.add_new("RescaleSlope", "LO", value)

    rewrite(path, change)
    try:
        np.testing.assert_array_equal(read_scan(path).array[0], volume()[0])
    except UserError as error:
        assert "Slope" in str(error)  # noqa: PT017


def test_large_slopes_do_not_wrap(tmp_path):
    array = np.full((13, 10), 40000, np.uint16)
    path = write_slice(tmp_path / "a.dcm", array, scaling=(100000, -5))
    assert read_scan(path).array.max() == 40000 * 100000 - 5
    folder = series(tmp_path / "a", np.stack([array] * 3), change=lambda i: {"scaling": (1, -i)})
    np.testing.assert_array_equal(read_scan(folder).array[:, 0, 0], [40000, 39999, 39998])


def test_frames_of_a_picture_with_lost_ends(tmp_path):
    path = write_slice(tmp_path / "a.dcm", volume()[:3])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 200])
    refusal(path)
    path.write_bytes(content)
    rewrite(path, lambda ds: setattr(ds, "NumberOfFrames", 4))
    refusal(path)


@pytest.mark.parametrize("keyword", ["Rows", "Columns"])
def test_header_that_contradicts_the_pixels(tmp_path, keyword):
    path = write_slice(tmp_path / "a.dcm", volume()[0])
    rewrite(path, lambda ds: setattr(ds, keyword, 5))
    refusal(path)
