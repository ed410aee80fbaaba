"""DICOM SEG as masks: segments become labels on the slices of their image."""

import numpy as np
import pydicom
import pytest
from pydicom.sequence import Sequence

from medsam_jax.errors import UserError
from medsam_jax.inference.dicom_seg import write_dicom_seg
from medsam_jax.io.dicom import dicom_files
from medsam_jax.io.scans import read_mask, read_mask_scan, read_scan
from tests.io.dicom_files import write_slice
from tests.io.test_dicom_frames import CLASSIC, enhanced, item
from tests.io.test_dicom_series import refused, volume, write

PATIENT = dict.fromkeys(
    ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID")
    + ("StudyDate", "StudyTime", "ReferringPhysicianName", "Manufacturer"),
    "",
)
BINARY, LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"


def labels(shape=(6, 16, 20)):
    found = np.zeros(shape, np.uint8)
    found[1:3, 2:9, 3:12] = 1
    found[4, 5:12, 8:19] = 2
    return found


def segmentation(path, array, depths, segments=None, kind="BINARY"):
    """Writes frames [frames, Y, X], of bits with `segments`, else of numbers."""
    groups = Sequence()
    for index, depth in enumerate(depths):
        group = item(
            PlanePositionSequence=item(ImagePositionPatient=[-5.0, 2.0, depth]),
            FrameContentSequence=item(StackID="1"),
        )
        if segments:
            group[0].SegmentIdentificationSequence = item(ReferencedSegmentNumber=segments[index])
        groups.extend(group)
    shared = item(
        PixelMeasuresSequence=item(PixelSpacing=[0.7, 0.8], SliceThickness=3),
        PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    tags = dict.fromkeys(CLASSIC) | {
        "SOPClassUID": BINARY if segments else LABEL_MAP,
        "SegmentationType": kind,
        "SharedFunctionalGroupsSequence": shared,
        "PerFrameFunctionalGroupsSequence": groups,
    }
    if segments:
        bits = np.packbits(array.astype(bool), bitorder="little").tobytes()
        tags |= {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
        tags["PixelData"] = bits + b"\0" * (len(bits) % 2)
    return write_slice(path, array, bits=8, tags=tags)


@pytest.mark.parametrize("upside_down", [False, True])
def test_the_seg_that_is_written(tmp_path, upside_down):
    step = -3.0 if upside_down else 3.0
    folder = write(tmp_path / "ct", volume(), step=step, tags=PATIENT)
    scan = read_scan(folder)
    files = sorted(folder.iterdir(), key=lambda file: int(file.stem) * step)
    names = {1: "liver", 2: "tumour"}
    write_dicom_seg(tmp_path / "s.dcm", labels().astype(int), [str(f) for f in files], names, "m")
    found = read_mask_scan(tmp_path / "s.dcm", scan)
    np.testing.assert_array_equal(found.array, labels())
    assert found.label_names == names


def test_frames_of_segments(tmp_path):
    scan = read_scan(write(tmp_path / "ct", volume()))
    array = labels()
    frames = np.stack([array[4] == 2, array[1] == 1, array[2] == 1])
    path = segmentation(tmp_path / "s.dcm", frames, [112.0, 103.0, 106.0], [2, 1, 1])
    np.testing.assert_array_equal(read_mask(path, scan), array)


def test_label_map_segmentation(tmp_path):
    scan = read_scan(write(tmp_path / "ct", volume()))
    depths = 100 + 3.0 * np.arange(6)
    path = segmentation(tmp_path / "s.dcm", labels(), depths, kind="LABELMAP")
    np.testing.assert_array_equal(read_mask(path, scan), labels())


def test_one_slice_of_many(tmp_path):
    scan = read_scan(write(tmp_path / "ct", volume()))
    path = segmentation(tmp_path / "s.dcm", labels()[1:2] == 1, [109.0], [7])
    found = read_mask(path, scan)
    np.testing.assert_array_equal(found[3], labels()[1] * 7)
    assert found[[0, 1, 2, 4, 5]].max() == 0


def test_fractional_and_cut(tmp_path):
    scan = read_scan(write(tmp_path / "ct", volume()))
    depths = 100 + 3.0 * np.arange(6)
    path = segmentation(tmp_path / "f.dcm", labels(), depths, [1] * 6, kind="FRACTIONAL")
    with pytest.raises(UserError, match="type FRACTIONAL"):
        read_mask(path, scan)
    path = segmentation(tmp_path / "c.dcm", labels() > 0, depths, [1] * 6)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cut"):
        read_mask(path, scan)


def test_a_seg_is_no_image_and_a_folder_may_hold_one(tmp_path):
    folder = write(tmp_path / "ct", volume())
    path = segmentation(tmp_path / "s.dcm", labels()[1:2] == 1, [103.0], [1])
    assert "is a DICOM Segmentation, which is a mask" in refused(path)
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "s.dcm"
    alone.write_bytes(path.read_bytes())
    assert read_mask(tmp_path / "alone", read_scan(folder)).max() == 1
    assert "is a mask" in refused(tmp_path / "alone")
    (folder / "s.dcm").write_bytes(path.read_bytes())
    scan = read_scan(folder)
    assert scan.array.shape == volume().shape
    assert any("s.dcm" in note for note in scan.notes)


def test_other_objects_are_named(tmp_path):
    for uid, name in (
        ("1.2.840.10008.5.1.4.1.1.481.3", "RT Structure Set"),
        ("1.2.840.10008.5.1.4.1.1.88.33", "Comprehensive SR"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "Softcopy Presentation State"),
        ("1.2.840.10008.5.1.4.1.1.88.59", "Key Object Selection"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "PDF"),
    ):
        path = write_slice(tmp_path / "a.dcm", volume()[0])
        dataset = pydicom.dcmread(path)
        del dataset.PixelData, dataset.Rows, dataset.Columns
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid
        dataset.save_as(path)
        assert name in refused(path)


def blob(seed):
    return np.random.default_rng(seed).random((16, 20)) > 0.5


def read_on_series(path, array, depths, segments, step=3.0):
    scan = read_scan(write(path / "ct", volume(), step=step))
    return read_mask_scan(segmentation(path / "a.dcm", array, depths, segments), scan)


@pytest.mark.parametrize("kept", [(1, 3, 5), (3,), (0, 5)])
@pytest.mark.parametrize("step", [-3.0, 2.5, 3.0])
def test_few_slices_stay_the_ones_they_are(tmp_path, kept, step):
    planes = np.stack([blob(place) for place in kept])
    depths = [100 + step * place for place in kept]
    found = read_on_series(tmp_path, planes, depths, [1] * len(kept), step)
    expected = np.zeros((6, 16, 20), bool)
    expected[list(kept)] = planes
    np.testing.assert_array_equal(found.array, expected[:: int(np.sign(step))])


def test_segments_in_any_order_of_frames(tmp_path):
    planes = np.stack([~blob(1), blob(1), ~blob(1), blob(1)])
    found = read_on_series(tmp_path, planes, [112.0, 103.0, 103.0, 115.0], [7, 2, 7, 2])
    expected = np.zeros((6, 16, 20), np.int32)
    expected[1] = np.where(blob(1), 2, 7)
    expected[4], expected[5] = ~blob(1) * 7, blob(1) * 2
    np.testing.assert_array_equal(found.array, expected)


def test_overlapping_segments_are_noted(tmp_path):
    planes = np.stack([blob(1), blob(1) | blob(2)])
    found = read_on_series(tmp_path, planes, [106.0, 106.0], [1, 2])
    np.testing.assert_array_equal(found.array[2], np.where(blob(1) | blob(2), 2, 0))
    assert any("several segments" in note for note in found.notes)


def test_the_seg_of_an_enhanced_file_in_any_order(tmp_path):
    pytest.importorskip("highdicom", reason="extra dicom is not installed")
    order = [3, 0, 5, 1, 4, 2]
    depths = [100 + 3.0 * place for place in order]
    source = str(enhanced(tmp_path / "ct.dcm", volume()[order], depths, **PATIENT))
    path = tmp_path / "s.dcm"
    write_dicom_seg(path, labels().astype(int), dicom_files(source), {1: "a", 2: "b"}, "m")
    np.testing.assert_array_equal(read_mask(path, read_scan(source)), labels())
