"""DICOM files of every kind that clinics send: the right values and places, or a named refusal."""

import io

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from medsam_jax.errors import UserError
from medsam_jax.inference.dicom_seg import write_dicom_seg
from medsam_jax.io.dicom import dicom_files, is_dicom, list_series
from medsam_jax.io.scans import read_mask, read_scan
from tests.io.dicom_files import write_slice as write_plain

PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
UNPLACED = dict.fromkeys(PLANE)
SHAPE = (8, 13, 11)  # 143 pixels a plane: frames of one bit do not end at a byte


def volume(shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def write_slice(path, plane, *args, tags=None, bits=None, **kwargs):
    """Writes a slice, frames or colours, with any tags; None removes one."""
    path.parent.mkdir(exist_ok=True)
    syntax = kwargs.pop("syntax", None)
    write_plain(path, np.zeros((2, 2), plane.dtype), *args, **kwargs)

    def change(ds):
        shape = plane.shape
        if shape[-1] == 3 and (tags or {}).get("SamplesPerPixel") == 3:
            shape = shape[:-1]
        if len(shape) == 3:
            ds.NumberOfFrames = shape[0]
        ds.Rows, ds.Columns = shape[-2:]
        ds.BitsStored = bits or ds.BitsAllocated
        ds.HighBit = ds.BitsStored - 1
        content = plane.tobytes()
        ds.PixelData = content + b"\0" * (len(content) % 2)
        for keyword, value in (tags or {}).items():
            if value is None and keyword in ds:
                delattr(ds, keyword)
            elif value is not None:
                setattr(ds, keyword, value)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        if syntax:
            ds.compress(syntax, generate_instance_uid=False)

    return rewrite(path, change)


def series(folder, array, step=3.0, tags=None, each=None, **kwargs):
    """Writes a series; `each(index)` returns arguments of one slice."""
    for index, plane in enumerate(array):
        own = {"position": (-5.0, 4.0, 100 + step * index), "number": index + 1, "tags": tags}
        own |= {**kwargs, **(each(index) if each else {})}
        write_slice(folder / f"{index}.dcm", own.pop("plane", plane), **own)
    return folder


def refusal(path, read=read_scan) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    text = str(error.value)
    assert "\n" not in text
    assert path.name in text
    return text


def rewrite(path, change):
    """Changes a written file's data set."""
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)
    return path


def item(**values):
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return Sequence([ds])


# --- segmentations as masks


def write_seg(path, planes, kind="BINARY", sop="1.2.840.10008.5.1.4.1.1.66.4", **tags):
    """Writes frames (segment, z, array) in their order; the grid is that of `series`."""
    frames = np.stack([plane for *_, plane in planes])
    path.parent.mkdir(exist_ok=True)
    write_slice(path, frames.astype(np.uint8), bits=8, tags=UNPLACED, uid="1.9")
    groups = []
    for segment, z, _ in planes:
        group = Dataset()
        group.PlanePositionSequence = item(ImagePositionPatient=[-5.0, 4.0, z])
        if segment:
            group.SegmentIdentificationSequence = item(ReferencedSegmentNumber=segment)
        groups.append(group)

    def change(ds):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop
        ds.Modality, ds.SegmentationType = "SEG", kind
        ds.NumberOfFrames = len(planes)
        ds.SharedFunctionalGroupsSequence = item(
            PixelMeasuresSequence=item(PixelSpacing=[0.7, 0.8], SliceThickness=3.0),
            PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        )
        ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
        if kind == "BINARY":
            ds.BitsAllocated = ds.BitsStored = 1
            ds.HighBit = 0
            bits = np.packbits(frames.astype(bool).ravel(), bitorder="little").tobytes()
            ds.PixelData = bits + b"\0" * (len(bits) % 2)
        for keyword, value in tags.items():
            setattr(ds, keyword, value)

    return rewrite(path, change)


def blob(seed=0):
    return np.random.default_rng(seed).random(SHAPE[1:]) > 0.5


def test_segments_in_any_order_of_frames(tmp_path):
    scan = read_scan(series(tmp_path / "ct", volume()))
    first, second = blob(1), ~blob(1)
    planes = [(7, 115.0, second), (2, 106.0, first), (7, 106.0, second), (2, 121.0, first)]
    expected = np.zeros(SHAPE, np.int32)
    expected[2] = np.where(first, 2, 7)
    expected[5], expected[7] = second * 7, first * 2
    path = write_seg(tmp_path / "seg.dcm", planes)
    np.testing.assert_array_equal(read_mask(path, scan), expected)


@pytest.mark.parametrize("kept", [(2, 4, 6), (3,), (0, 7)])
def test_segment_on_few_slices_stays_on_them(tmp_path, kept):
    scan = read_scan(series(tmp_path / "ct", volume()))
    path = write_seg(tmp_path / "seg.dcm", [(1, 100.0 + 3 * z, blob(z)) for z in kept])
    expected = np.zeros(SHAPE, np.int32)
    for z in kept:
        expected[z] = blob(z)
    np.testing.assert_array_equal(read_mask(path, scan), expected)


def test_segment_on_a_series_of_slices_from_head_to_feet(tmp_path):
    scan = read_scan(series(tmp_path / "ct", volume(), step=-3.0))
    path = write_seg(tmp_path / "seg.dcm", [(1, 103.0, blob(1)), (1, 94.0, blob(2))])
    labels = read_mask(write_seg(path, [(1, 97.0, blob(1)), (1, 94.0, blob(2))]), scan)
    assert labels.any(axis=(1, 2)).tolist() == [z in (97.0, 94.0) for z in 79 + 3.0 * np.arange(8)]


def test_overlapping_segments_are_not_dropped_silently(tmp_path):
    scan = read_scan(series(tmp_path / "ct", volume()))
    path = write_seg(tmp_path / "seg.dcm", [(1, 106.0, blob(1)), (2, 106.0, blob(1) | blob(2))])
    assert "overlap" in refusal(path, lambda file: read_mask(file, scan))


def test_label_map_segmentation(tmp_path):
    scan = read_scan(series(tmp_path / "ct", volume()))
    labels = np.random.default_rng(3).integers(0, 4, (2, *SHAPE[1:]))
    planes = [(0, 118.0, labels[0]), (0, 103.0, labels[1])]
    path = write_seg(
        tmp_path / "seg.dcm", planes, "LABELMAP", "1.2.840.10008.5.1.4.1.1.66.7"
    )
    expected = np.zeros(SHAPE, np.int32)
    expected[6], expected[1] = labels
    np.testing.assert_array_equal(read_mask(path, scan), expected)


def test_fractional_segmentation(tmp_path):
    scan = read_scan(series(tmp_path / "ct", volume()))
    planes = [(1, 106.0, np.random.default_rng(0).integers(0, 256, SHAPE[1:]))]
    path = write_seg(tmp_path / "seg.dcm", planes, "FRACTIONAL", MaximumFractionalValue=255)
    text = refusal(path, lambda file: read_mask(file, scan))
    assert "fraction" in text.lower()
    assert "threshold" in text or "binary" in text


def test_segmentation_is_no_image(tmp_path):
    path = write_seg(tmp_path / "seg.dcm", [(1, 106.0, blob())])
    assert "Segmentation" in refusal(path)
    alone = tmp_path / "alone"
    write_seg(alone / "seg.dcm", [(1, 106.0, blob())])
    assert "Segmentation" in refusal(alone)


def test_segmentation_beside_its_series_is_no_slice(tmp_path):
    folder = series(tmp_path / "ct", volume())
    write_seg(folder / "seg.dcm", [(1, 106.0, blob())])
    np.testing.assert_array_equal(read_scan(folder).array, volume())
    assert [len(files) for files in list_series(folder).values()] == [8]


def test_written_segmentation_is_read_back(tmp_path):
    pytest.importorskip("highdicom", reason="extra dicom is not installed")
    folder = series(tmp_path / "ct", volume())
    labels = np.zeros(SHAPE, np.int32)
    labels[3:6, 2:9, 4:8], labels[6:8, 1:5, 1:5] = 1, 2
    complete(folder)
    path = tmp_path / "ct_mask.dcm"
    write_dicom_seg(path, labels, dicom_files(str(folder)), {1: "liver", 2: "spleen"}, "tiny")
    np.testing.assert_array_equal(read_mask(path, read_scan(folder)), labels)
    assert dicom_files(str(path)) == (str(path),)


def complete(folder):
    """Adds the attributes of patient and study that a SEG repeats."""
    for file in folder.iterdir():

        def change(ds):
            ds.PatientName = ds.PatientID = ds.PatientBirthDate = ds.PatientSex = ""
            ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ""
            ds.ReferringPhysicianName = ds.StudyID = ds.PositionReferenceIndicator = ""
            ds.SeriesNumber = 1

        rewrite(file, change)


# --- objects without an image


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
    folder = series(tmp_path / "ct", volume())
    complete(folder)
    index = pydicom.fileset.FileSet()
    for file in folder.iterdir():
        index.add(file)
    index.write(tmp_path / "disc")
    text = refusal(tmp_path / "disc" / "DICOMDIR")
    assert "index" in text or "Directory" in text
    inner = next(path for path in (tmp_path / "disc").rglob("*") if path.is_file() and path.name != "DICOMDIR").parent
    assert read_scan(inner).array.shape == SHAPE
    (inner / "DICOMDIR").write_bytes((tmp_path / "disc" / "DICOMDIR").read_bytes())
    np.testing.assert_array_equal(read_scan(inner).array, volume())
    assert inner.name in refusal(tmp_path / "disc")  # says where the files are
