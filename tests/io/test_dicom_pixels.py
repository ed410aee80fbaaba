"""Pixels of DICOM files: compression, colours, padding, lookup tables, spacing of projections."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from medsam_jax.io.scans import read_scan
from tests.io.dicom_files import RLE, write_slice
from tests.io.test_dicom_frames import item
from tests.io.test_dicom_series import refused, volume, write

JPEG_2000, JPEG, MPEG = (f"1.2.840.10008.1.2.4.{end}" for end in ("90", "50", "100"))
NO_PLACE = dict.fromkeys(["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])


def pictured(path, array, name, syntax, **tags):
    """Writes frames compressed by Pillow, which `name` chooses ("JPEG", "JPEG2000")."""
    pictures = []
    for plane in array:
        buffer = io.BytesIO()
        options = {"irreversible": False} if name == "JPEG2000" else {"quality": 95}
        Image.fromarray(plane).save(buffer, name, **options)
        pictures.append(buffer.getvalue())
    first = array[0] if array.ndim == 3 else array[0, ..., 0]
    write_slice(path, first, bits=first.itemsize * 8, tags=tags)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    if len(array) > 1:
        dataset.NumberOfFrames = len(array)
    dataset.PixelData = encapsulate(pictures)
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


def colours(shape=(16, 20)):
    return np.random.default_rng(1).integers(0, 255, (*shape, 3)).astype(np.uint8)


def rgb(path, array, **tags):
    write_slice(path, array[..., 0], bits=8)
    dataset = pydicom.dcmread(path)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration = 0
    dataset.PixelData = array.tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


def test_jpeg_2000_with_a_slope(tmp_path):
    array = volume((1, 40, 50))
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-1024"}
    path = pictured(tmp_path / "a.dcm", array, "JPEG2000", JPEG_2000, **tags)
    np.testing.assert_array_equal(read_scan(path).array, array.astype(int) * 2 - 1024)


def test_compressed_frames(tmp_path):
    array = volume((4, 40, 50)).astype(np.uint8)
    path = pictured(tmp_path / "a.dcm", array, "JPEG2000", JPEG_2000)
    np.testing.assert_array_equal(read_scan(path).array, array)


def test_a_cut_compressed_file(tmp_path):
    path = pictured(tmp_path / "a.dcm", volume((3, 40, 50)), "JPEG2000", JPEG_2000)
    content = path.read_bytes()
    for end in range(len(content) - 3000, len(content), 97):
        path.write_bytes(content[:end])
        assert "cut within its compressed pixels" in refused(path)


def test_missing_frames_and_another_size(tmp_path):
    path = pictured(tmp_path / "a.dcm", volume((3, 40, 50)), "JPEG2000", JPEG_2000)
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames = 4
    dataset.save_as(path)
    assert "holds 3 of its 4 compressed frames" in refused(path)
    dataset.NumberOfFrames, dataset.Rows = 3, 41
    dataset.save_as(path)
    assert "says 41 x 50 pixels, its compressed picture 40 x 50" in refused(path)


def test_promises_are_checked_before_they_are_allocated(tmp_path):
    path = write_slice(tmp_path / "a.dcm", volume()[0], syntax=RLE)
    dataset = pydicom.dcmread(path)
    dataset.Rows = dataset.Columns = 60000
    dataset.save_as(path)
    assert "promises" in refused(path)
    path = write_slice(tmp_path / "b.dcm", volume()[0], tags={"Rows": 60000, "Columns": 60000})
    assert "640 bytes for 1 x 60000 x 60000" in refused(path)


def test_a_video_is_refused(tmp_path):
    path = pictured(tmp_path / "a.dcm", colours()[None], "JPEG", JPEG)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = MPEG
    dataset.save_as(path)
    assert "is a video" in refused(path)


def test_jpeg_of_colours(tmp_path):
    smooth = np.stack(np.meshgrid(np.arange(48), np.arange(40)), -1).astype(np.uint8)
    smooth = np.concatenate([smooth, smooth[..., :1] + 100], -1)[None]
    kinds = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422"}
    path = pictured(tmp_path / "a.dcm", smooth, "JPEG", JPEG, PlanarConfiguration=0, **kinds)
    found = read_scan(path).array
    assert found.shape == (1, 40, 48, 3)
    assert np.abs(found.astype(int) - smooth).max() < 12


def test_colours(tmp_path):
    array = colours()
    found = read_scan(rgb(tmp_path / "a.dcm", array)).array
    np.testing.assert_array_equal(found, array[None])
    planes = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    path = rgb(tmp_path / "b.dcm", array, PlanarConfiguration=1, PixelData=planes.tobytes())
    np.testing.assert_array_equal(read_scan(path).array, array[None])
    grey = np.stack([array[..., 0], np.full((16, 20), 128), np.full((16, 20), 128)], -1)
    path = rgb(tmp_path / "c.dcm", grey.astype(np.uint8), PhotometricInterpretation="YBR_FULL")
    np.testing.assert_array_equal(read_scan(path).array, np.repeat(array[None, ..., :1], 3, -1))
    path = rgb(tmp_path / "d.dcm", array, PhotometricInterpretation="HSV")
    assert "HSV" in refused(path)


def test_palette(tmp_path):
    plane, table = volume()[0].astype(np.uint8), np.arange(256, dtype=np.uint16)
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in (("Red", table), ("Green", 255 - table), ("Blue", 0 * table)):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = (values * 257).astype("<u2").tobytes()
    found = read_scan(write_slice(tmp_path / "a.dcm", plane, bits=8, tags=tags)).array
    found = (found >> 8 if found.dtype == np.uint16 else found)[0]
    np.testing.assert_array_equal(found, np.stack([plane, 255 - plane, 0 * plane], -1))


@pytest.mark.parametrize(("dtype", "bits"), [("uint16", 12), ("int16", 12), ("int16", 16)])
def test_bits_beside_the_value_are_dropped(tmp_path, dtype, bits):
    plane = np.arange(320).reshape(16, 20).astype(dtype)
    if dtype == "int16":
        plane[0] = -5
    stored = plane.view(np.uint16) & ((1 << bits) - 1)
    if bits == 12:
        stored[:, ::2] |= 0x8000  # an overlay
    path = write_slice(tmp_path / "a.dcm", stored.astype("<u2").view(dtype), bits=bits)
    np.testing.assert_array_equal(read_scan(path).array[0], plane)


def test_white_is_zero(tmp_path):
    plane = volume()[0] % 4096
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    path = write_slice(tmp_path / "a.dcm", plane, scaling=(1, -5), bits=12, tags=tags)
    np.testing.assert_array_equal(read_scan(path).array[0], 4095 - 5 - plane.astype(int))


def test_bright_padding_is_dark(tmp_path):
    plane = volume()[0] + 10
    plane[:, :3] = 65535
    scan = read_scan(write_slice(tmp_path / "a.dcm", plane, tags={"PixelPaddingValue": 65535}))
    assert (scan.array[0, :, :3] == plane.min()).all()
    np.testing.assert_array_equal(scan.array[0, :, 3:], plane[:, 3:])
    assert any("48 pixels of padding" in note for note in scan.notes)
    plane[:, :3] = 0
    scan = read_scan(write_slice(tmp_path / "b.dcm", plane, tags={"PixelPaddingValue": 0}))
    np.testing.assert_array_equal(scan.array[0], plane)
    assert scan.notes == ()


def test_modality_lookup_table(tmp_path):
    table = (np.arange(500) * 3).astype("<u2").tobytes()
    lut = item(LUTDescriptor=[500, 10, 16], ModalityLUTType="US", LUTData=table)
    scan = read_scan(
        write_slice(tmp_path / "a.dcm", volume()[0], tags={"ModalityLUTSequence": lut})
    )
    np.testing.assert_array_equal(scan.array[0], np.clip(volume()[0].astype(int) - 10, 0, 499) * 3)


def test_float_pixels(tmp_path):
    plane = np.linspace(-1, 1, 320, dtype=np.float32).reshape(16, 20)
    tags = {"FloatPixelData": plane.tobytes(), "PixelData": None, "BitsStored": None}
    path = write_slice(tmp_path / "a.dcm", plane, tags=tags | {"HighBit": None})
    np.testing.assert_array_equal(read_scan(path).array[0], plane)


def region(delta, shape=1, units=3):
    dataset = Dataset()
    dataset.RegionSpatialFormat, dataset.RegionDataType, dataset.RegionFlags = shape, 1, 0
    dataset.PhysicalUnitsXDirection = dataset.PhysicalUnitsYDirection = units
    dataset.PhysicalDeltaX, dataset.PhysicalDeltaY = delta, -delta
    return dataset


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ([], np.nan),
        ([region(0.02)], 0.2),
        ([region(0.02), region(0.5, shape=2, units=4)], 0.2),
        ([region(0.02), region(0.03)], np.nan),
        ([region(0.02, units=4)], np.nan),
        ([region(0.02, shape=3)], np.nan),
    ],
)
def test_ultrasound_spacing(tmp_path, regions, expected):
    tags = NO_PLACE | {"SequenceOfUltrasoundRegions": Sequence(regions)}
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume()[0], tags=tags))
    np.testing.assert_allclose(scan.spacing, (np.nan, expected, expected))
    assert scan.affine is None


def test_spacing_at_the_detector_is_noted(tmp_path):
    tags = NO_PLACE | {"ImagerPixelSpacing": [0.1, 0.2]}
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume()[0], tags=tags))
    np.testing.assert_array_equal(scan.spacing, (np.nan, 0.1, 0.2))
    assert any("at the detector" in note for note in scan.notes)


def test_files_without_preamble_are_noted(tmp_path):
    path = write_slice(tmp_path / "a.dcm", volume()[0])
    path.write_bytes(path.read_bytes()[132:])
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array[0], volume()[0])
    assert any("no preamble" in note for note in scan.notes)


def test_a_slope_of_zero_is_refused(tmp_path):
    path = write_slice(tmp_path / "a.dcm", volume()[0], scaling=(0, 5))
    assert "its RescaleSlope is 0" in refused(path)


def test_names_without_suffix(tmp_path):
    folder = write(tmp_path / "a", volume())
    for file in list(folder.iterdir()):
        file.rename(folder / f"IM{file.stem}")
    np.testing.assert_array_equal(read_scan(folder).array, volume())
    np.testing.assert_array_equal(read_scan(folder / "IM1").array[0], volume()[1])
