"""DICOM files of every kind that clinics send: the right values and places, or a named refusal."""

import io

import numpy as np
import pydicom
import pydicom.fileset
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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    path = write_seg(tmp_path / "seg.dcm", planes, "LABELMAP", "1.2.840.10008.5.1.4.1.1.66.7")
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
            ds.PatientName = ds.PatientBirthDate = ds.PatientSex = ds.AccessionNumber = ""
            ds.PatientID, ds.StudyDate, ds.StudyTime = "1", "20200102", "101010"
            ds.ReferringPhysicianName = ds.PositionReferenceIndicator = ""
            ds.SeriesNumber, ds.StudyID = 1, "1"

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
    inner = next(
        path
        for path in (tmp_path / "disc").rglob("*")
        if path.is_file() and path.name != "DICOMDIR"
    ).parent
    assert read_scan(inner).array.shape == SHAPE
    (inner / "DICOMDIR").write_bytes((tmp_path / "disc" / "DICOMDIR").read_bytes())
    np.testing.assert_array_equal(read_scan(inner).array, volume())
    assert inner.name in refusal(tmp_path / "disc")  # says where the files are


# --- pixels


def colours(shape=(13, 10)):
    """Smooth colours, which lossy compression keeps."""
    y, x = np.indices(shape)
    return np.stack([y * 10 + 40, x * 12 + 60, 200 - y * 5 - x * 5], -1).astype(np.uint8)


RGB = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def test_colours_by_pixel_and_by_plane(tmp_path):
    by_pixel = write_slice(tmp_path / "a.dcm", colours(), tags=RGB)
    np.testing.assert_array_equal(read_scan(by_pixel).array[0], colours())
    planes = np.ascontiguousarray(colours().transpose(2, 0, 1))
    shape = {"NumberOfFrames": 1, "Rows": 13, "Columns": 10}
    by_plane = write_slice(
        tmp_path / "b.dcm", planes, tags=RGB | shape | {"PlanarConfiguration": 1}
    )
    np.testing.assert_array_equal(read_scan(by_plane).array[0], colours())


def to_ybr(rgb):
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


def test_luminance_and_chrominance_become_colours(tmp_path):
    tags = RGB | {"PhotometricInterpretation": "YBR_FULL"}
    path = write_slice(tmp_path / "a.dcm", to_ybr(colours()), tags=tags)
    found = read_scan(path).array[0].astype(int)
    assert np.abs(found - colours()).max() <= 2  # rounded twice


def test_halved_chrominance(tmp_path):
    ybr = to_ybr(np.repeat(colours((13, 5)), 2, axis=1))  # pairs of equal pixels
    packed = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1)
    tags = RGB | {"PhotometricInterpretation": "YBR_FULL_422", "Rows": 13, "Columns": 10}
    path = write_slice(tmp_path / "a.dcm", packed.reshape(13, 20), tags=tags)
    found = read_scan(path).array[0].astype(int)
    assert np.abs(found - np.repeat(colours((13, 5)), 2, axis=1)).max() <= 2


def encapsulated(path, frames, syntax, tags):
    def change(ds):
        ds.PixelData = encapsulate(frames)
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = syntax

    write_slice(
        path, np.zeros((2, 2), np.uint8 if tags["BitsAllocated"] == 8 else np.uint16), tags=tags
    )
    return rewrite(path, change)


def jpeg(array, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, **{"format": "JPEG", "quality": 95} | options)
    return stream.getvalue()


def test_jpeg_colours(tmp_path):
    tags = RGB | {"PhotometricInterpretation": "YBR_FULL_422", "Rows": 64, "Columns": 64}
    smooth = colours((64, 64))
    smooth = np.stack(
        np.meshgrid(np.arange(64) * 3, np.arange(64) * 2 + 50, indexing="ij")[:2]
        + (np.full((64, 64), 90),),
        -1,
    ).astype(np.uint8)
    tags |= {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    path = encapsulated(tmp_path / "a.dcm", [jpeg(smooth)], JPEGBaseline8Bit, tags)
    assert np.abs(read_scan(path).array[0].astype(int) - smooth).max() <= 6
    frames = [jpeg(smooth), jpeg(smooth[::-1].copy())]
    path = encapsulated(tmp_path / "b.dcm", frames, JPEGBaseline8Bit, tags | {"NumberOfFrames": 2})
    found = read_scan(path).array
    assert np.abs(found[1].astype(int) - smooth[::-1]).max() <= 6
    rewrite(path, lambda ds: setattr(ds, "NumberOfFrames", 3))
    refusal(path)
    path.write_bytes(path.read_bytes()[:-1500])
    refusal(path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_jpeg_2000_16_bits(tmp_path, dtype):
    array = (np.arange(64 * 64).reshape(64, 64) * 7).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="JPEG2000", no_jp2=True, irreversible=False)
    tags = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "Rows": 64, "Columns": 64}
    path = encapsulated(tmp_path / "a.dcm", [stream.getvalue()], JPEG2000Lossless, tags)
    np.testing.assert_array_equal(read_scan(path).array[0], array)


@pytest.mark.parametrize("syntax", [RLELossless, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_series_in_other_transfer_syntaxes(tmp_path, syntax):
    array = volume() - 100
    folder = tmp_path / "a"
    for index, plane in enumerate(array):
        path = write_slice(folder / f"{index}.dcm", plane, (0, 0, 3.0 * index), number=index)
        if syntax == RLELossless:
            rewrite(path, lambda ds: ds.compress(syntax, generate_instance_uid=False))
            continue
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


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_becomes_colours(tmp_path, bits):
    indices = (np.arange(130) % 4).reshape(13, 10).astype(np.uint8)
    table = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [7, 200, 90]])
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, column in zip(("Red", "Green", "Blue"), table.T, strict=True):
        values = column.astype(np.uint8) if bits == 8 else (column * 257).astype("<u2")
        tags[f"{name}PaletteColorLookupTableData"] = values.tobytes()

    def change(ds):
        for tag in (0x00281101, 0x00281102, 0x00281103):
            ds.add_new(tag, "US", [4, 0, bits])

    path = rewrite(write_slice(tmp_path / "a.dcm", indices, tags=tags), change)
    np.testing.assert_array_equal(read_scan(path).array[0], table[indices])


def test_bits_that_are_no_part_of_the_value(tmp_path):
    values = np.random.default_rng(0).integers(-2048, 2048, (13, 10))
    stored = ((values & 0xFFF) | 0xA000).astype(np.uint16)  # overlays in the upper bits
    path = write_slice(tmp_path / "a.dcm", stored, bits=12, tags={"PixelRepresentation": 1})
    np.testing.assert_array_equal(read_scan(path).array[0], values)


def test_one_bit_a_pixel(tmp_path):
    bits = np.random.default_rng(0).random((13, 10)) > 0.5
    packed = np.packbits(bits.ravel(), bitorder="little")
    tags = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "Rows": 13, "Columns": 10}
    path = write_slice(tmp_path / "a.dcm", packed[None], tags=tags)
    np.testing.assert_array_equal(read_scan(path).array[0], bits)


def test_float_pixels(tmp_path):
    array = np.random.default_rng(0).normal(size=(13, 10)).astype(np.float32)

    def change(ds):
        del ds.PixelData
        ds.FloatPixelData = array.tobytes()
        ds.BitsAllocated = 32

    path = rewrite(write_slice(tmp_path / "a.dcm", array.astype(np.int32)), change)
    np.testing.assert_array_equal(read_scan(path).array[0], array)


def test_white_is_zero(tmp_path):
    array = volume()[0].astype(np.uint16)
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    path = write_slice(tmp_path / "a.dcm", array, bits=12, tags=tags)
    found = read_scan(path).array[0].astype(int)
    np.testing.assert_array_equal(found - found.min(), array.max() - array.astype(int))


def test_table_of_values(tmp_path):
    array = (volume()[0] % 8).astype(np.uint16)
    table = np.array([0, 1, 4, 9, 16, 25, 36, 49], np.uint16)
    sequence = item(ModalityLUTType="US", LUTData=table.tobytes())
    sequence[0].add_new(0x00283002, "US", [8, 0, 16])
    sequence[0]["LUTData"].VR = "OW"
    path = write_slice(tmp_path / "a.dcm", array, tags={"ModalityLUTSequence": sequence})
    try:
        found = read_scan(path).array[0]
    except UserError as error:
        assert "LUT" in str(error)  # noqa: PT017
    else:
        np.testing.assert_array_equal(found, table[array])


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
    folder = series(tmp_path / "a", np.stack([array] * 3), each=lambda i: {"scaling": (1, -i)})
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


# --- geometry of series


def test_sizes_photometric_and_samples_that_differ(tmp_path):
    folder = series(tmp_path / "a", volume())
    write_slice(folder / "3.dcm", colours((13, 11)), (-5, 4, 109.0), tags=RGB)
    assert "3.dcm" in refusal(folder)
    folder = series(tmp_path / "b", volume())
    write_slice(folder / "3.dcm", volume()[3][:5], (-5, 4, 109.0))
    assert "3.dcm" in refusal(folder)
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    folder = series(tmp_path / "c", volume().astype(np.uint16))
    write_slice(folder / "3.dcm", volume()[3].astype(np.uint16), (-5, 4, 109.0), tags=tags)
    assert "3.dcm" in refusal(folder)


def tilted(degrees):
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]]).T


@pytest.mark.parametrize("degrees", [-25, 1.5, 20])
def test_tilted_gantry(tmp_path, degrees):
    array = volume((40, 13, 11))
    assert f"{abs(degrees):g}" in refusal(series(tmp_path / "a", array, direction=tilted(degrees)))


def test_oblique_slices_are_no_tilt(tmp_path):
    direction = tilted(20)

    def place(index):
        return {"position": tuple(np.array([-5.0, 4.0, 100]) + 2.5 * index * direction[:, 2])}

    scan = read_scan(series(tmp_path / "a", volume(), each=place, direction=direction))
    np.testing.assert_array_equal(scan.array, volume())
    assert scan.spacing == pytest.approx((2.5, 0.7, 0.8))
    np.testing.assert_allclose(np.reshape(scan.affine[2], (3, 3)), direction, atol=1e-9)


def test_decreasing_and_shuffled_slices(tmp_path):
    order = np.random.default_rng(1).permutation(8)

    def shuffled(index):
        return {"plane": volume()[order[index]], "position": (1, 2, -3.0 * order[index])}

    scan = read_scan(series(tmp_path / "a", volume(), each=shuffled))
    np.testing.assert_array_equal(scan.array, volume()[::-1])
    assert scan.affine[0][2] == pytest.approx(-21)
    files = dicom_files(str(tmp_path / "a"))
    assert [pydicom.dcmread(file).ImagePositionPatient[2] for file in files] == [
        -21 + 3 * index for index in range(8)
    ]


@pytest.mark.parametrize(
    "tags",
    [
        {"TemporalPositionIdentifier": 2},
        {"TriggerTime": "40"},
        {"DiffusionBValue": 1000.0},
        {"EchoTime": "90"},
        {"AcquisitionNumber": 2},
        {"InversionTime": "900"},
        {"FlipAngle": "30"},
        {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]},
        {"AcquisitionTime": "101112"},
        {"ContrastBolusAgent": "Gd"},
        {"SeriesDescription": "late"},
    ],
)
def test_two_volumes_in_a_series(tmp_path, tags):
    folder = tmp_path / "a"
    key = next(iter(tags))
    series(folder, volume(), tags={key: pydicom_default(tags[key])})
    for index, plane in enumerate(volume()):
        write_slice(
            folder / f"late{index}.dcm",
            plane,
            (-5, 4, 100 + 3.0 * index),
            number=50 + index,
            tags=tags,
        )
    text = refusal(folder)
    assert "8 positions" in text
    assert " 2 " in text
    if key not in ("ContrastBolusAgent", "SeriesDescription"):
        assert key in text


def pydicom_default(value):
    if value == "101112":
        return "101010"
    return {list: ["ORIGINAL", "PRIMARY", "M", "ND"], int: 1, float: 0.0, str: "1"}[type(value)]


def test_a_copy_with_other_pixels_is_refused(tmp_path):
    folder = series(tmp_path / "a", volume())
    path = folder / "copy.dcm"
    path.write_bytes((folder / "3.dcm").read_bytes())
    rewrite(path, lambda ds: setattr(ds, "PixelData", b"\1" * len(ds.PixelData)))
    try:
        scan = read_scan(folder)
    except UserError as error:
        assert "copy.dcm" in str(error)  # noqa: PT017
    else:
        assert any("copy.dcm" in note for note in scan.notes)


def test_rounding_that_does_not_add_up_and_one_that_does(tmp_path):
    folder = series(
        tmp_path / "a", volume(), each=lambda i: {"position": (0, 0, round(i * 1.25, 1))}
    )
    assert read_scan(folder).spacing[0] == pytest.approx(8.8 / 7, abs=1e-6)
    drift = np.cumsum([0, *[1.0] * 10, *[1.15] * 10])
    folder = series(
        tmp_path / "b", volume((21, 13, 11)), each=lambda i: {"position": (0, 0, drift[i])}
    )
    assert "not evenly spaced" in refusal(folder)


def test_a_slice_missing_beside_the_end(tmp_path):
    folder = series(tmp_path / "a", volume())
    (folder / "6.dcm").unlink()
    assert "not evenly spaced" in refusal(folder)


def test_interleaved_thin_slices_count_by_position(tmp_path):
    scan = read_scan(series(tmp_path / "a", volume(), step=2.0, tags={"SliceThickness": "5"}))
    assert scan.spacing[0] == 2.0


def test_spacing_between_slices_that_differs_from_positions_is_noted(tmp_path):
    scan = read_scan(series(tmp_path / "a", volume(), tags={"SpacingBetweenSlices": "6"}))
    assert scan.spacing[0] == 3.0
    assert any("SpacingBetweenSlices" in note for note in scan.notes)


@pytest.mark.parametrize(
    "keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"]
)
def test_one_slice_that_lacks_its_place(tmp_path, keyword):
    folder = series(
        tmp_path / "a", volume(), each=lambda i: {"tags": {keyword: None} if i == 3 else {}}
    )
    assert "3.dcm" in refusal(folder)


def test_orientation_that_is_no_right_angle(tmp_path):
    tags = {"ImageOrientationPatient": [1, 0, 0, 0.5, 0.866, 0]}
    refusal(series(tmp_path / "a", volume(), tags=tags))
    refusal(series(tmp_path / "b", volume(), tags={"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}))


def test_orientation_written_with_few_decimals(tmp_path):
    direction = tilted(33)

    def place(index):
        rows = [f"{value:.4f}" for value in direction[:, :2].T.ravel()]
        position = np.array([-5.0, 4.0, 100]) + 2.5 * index * direction[:, 2]
        return {"position": tuple(position), "tags": {"ImageOrientationPatient": rows}}

    scan = read_scan(series(tmp_path / "a", volume(), each=place))
    assert scan.spacing[0] == pytest.approx(2.5, rel=1e-3)
    axes = np.reshape(scan.affine[2], (3, 3))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)


# --- spacing


def test_pictures_state_no_mm(tmp_path):
    for sop, modality in (
        ("1.2.840.10008.5.1.4.1.1.6.1", "US"),
        ("1.2.840.10008.5.1.4.1.1.7", "OT"),
    ):
        tags = UNPLACED | {"SOPClassUID": sop, "Modality": modality}
        scan = read_scan(write_slice(tmp_path / f"{modality}.dcm", volume()[0], tags=tags))
        assert np.isnan(scan.spacing).all()


def region(x0=0, y0=0, x1=10, y1=12, units=3, delta=0.02, kind=1):
    ds = Dataset()
    ds.RegionSpatialFormat, ds.RegionDataType, ds.RegionFlags = kind, 1, 0
    ds.RegionLocationMinX0, ds.RegionLocationMinY0 = x0, y0
    ds.RegionLocationMaxX1, ds.RegionLocationMaxY1 = x1, y1
    ds.PhysicalUnitsXDirection = ds.PhysicalUnitsYDirection = units
    ds.PhysicalDeltaX, ds.PhysicalDeltaY = delta, 1.5 * delta
    return ds


def ultrasound(path, *regions):
    tags = UNPLACED | {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", "Modality": "US"}
    tags |= {"SequenceOfUltrasoundRegions": Sequence(regions)}
    return read_scan(write_slice(path, volume()[0], tags=tags))


def test_ultrasound_regions(tmp_path):
    scan = ultrasound(tmp_path / "a.dcm", region())
    np.testing.assert_allclose(scan.spacing[1:], (0.3, 0.2), rtol=1e-6)
    assert np.isnan(scan.spacing[0])
    doppler = region(units=4, kind=3)
    np.testing.assert_allclose(
        ultrasound(tmp_path / "b.dcm", region(), doppler).spacing[1:], (0.3, 0.2)
    )
    two = ultrasound(tmp_path / "c.dcm", region(x1=5), region(x0=6, delta=0.05))
    assert np.isnan(two.spacing).all()
    assert any("region" in note for note in two.notes)
    assert np.isnan(ultrasound(tmp_path / "d.dcm", doppler).spacing).all()
    assert np.isnan(ultrasound(tmp_path / "e.dcm", region(delta=0.0)).spacing).all()
    negative = ultrasound(tmp_path / "f.dcm", region(delta=-0.02))
    np.testing.assert_allclose(negative.spacing[1:], (0.3, 0.2), rtol=1e-6)


def test_ultrasound_cine_has_no_mm_between_frames(tmp_path):
    tags = UNPLACED | {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.3.1",
        "Modality": "US",
        "FrameTime": "33",
    }
    tags |= {"SequenceOfUltrasoundRegions": Sequence([region()])}
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume(), tags=tags))
    assert np.isnan(scan.spacing[0])
    np.testing.assert_array_equal(scan.array, volume())
    assert any("frames" in note.lower() for note in scan.notes)


@pytest.mark.parametrize("keyword", ["ImagerPixelSpacing", "NominalScannedPixelSpacing"])
def test_spacing_at_the_detector_is_noted(tmp_path, keyword):
    tags = UNPLACED | {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "Modality": "DX"}
    scan = read_scan(
        write_slice(tmp_path / "a.dcm", volume()[0], tags=tags | {keyword: [0.3, 0.2]})
    )
    assert any("detector" in note or keyword in note for note in scan.notes)
    np.testing.assert_allclose(scan.spacing[1:], (0.3, 0.2))


def test_spacing_of_one_slice(tmp_path):
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume()[0]))
    np.testing.assert_allclose(scan.spacing[1:], (0.7, 0.8))


def test_nuclear_medicine_states_its_step(tmp_path):
    tags = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.20", "Modality": "NM"}
    tags |= {"SpacingBetweenSlices": "4.5", "SliceThickness": "4.5"}
    detector = item(ImagePositionPatient=[1, 2, 3], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    tags |= {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    tags |= {"DetectorInformationSequence": detector}
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume(), tags=tags))
    np.testing.assert_array_equal(scan.array, volume())
    np.testing.assert_allclose(scan.spacing, (4.5, 0.7, 0.8))
    assert scan.notes  # that the step is the header's, without positions


# --- files and folders


def test_without_preamble(tmp_path):
    plain = write_slice(tmp_path / "a.dcm", volume()[0])
    content = plain.read_bytes()
    (tmp_path / "meta.dcm").write_bytes(content[132:])
    ds = pydicom.dcmread(plain)
    del ds.file_meta
    for implicit in (True, False):
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


@pytest.mark.parametrize("name", ["a.dcm", "a.ima", "a.dicom", "a", "a.DCM", "1.2.840.1"])
def test_names_of_files(tmp_path, name):
    path = write_slice(tmp_path / name, volume()[0])
    np.testing.assert_array_equal(read_scan(path).array[0], volume()[0])
    assert is_dicom(str(path))


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


def test_a_cut_file_of_a_compressed_series_is_named(tmp_path):
    array = np.repeat(np.repeat(volume(), 4, 1), 4, 2)
    folder = series(tmp_path / "a", array)
    for file in folder.iterdir():
        rewrite(file, lambda ds: ds.compress(RLELossless, generate_instance_uid=False))
    np.testing.assert_array_equal(read_scan(folder).array, array)
    file = folder / "7.dcm"
    file.write_bytes(file.read_bytes()[:-300])
    assert "7.dcm" in refusal(folder)


def test_a_folder_above_the_series_says_so(tmp_path):
    series(tmp_path / "patient" / "CT", volume())
    text = refusal(tmp_path / "patient")
    assert "CT" in text


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


def test_one_series_read_by_itk_is_the_same(tmp_path):
    folder = series(tmp_path / "a", volume(), step=-2.5, scaling=(2, -1024))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.array, sitk.GetArrayFromImage(image))
    for one, other in zip(
        scan.affine, (image.GetOrigin(), image.GetSpacing(), image.GetDirection()), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)
