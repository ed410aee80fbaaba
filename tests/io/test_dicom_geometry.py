"""Places of DICOM slices: order, spacing and orientation, or a refusal that names the slices."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medsam_jax.io.dicom import dicom_files
from medsam_jax.io.scans import read_scan
from tests.io.dicom_files import write_slice
from tests.io.test_dicom_frames import item
from tests.io.test_dicom_pixels import colours, rgb
from tests.io.test_dicom_series import refused as refusal
from tests.io.test_dicom_series import write as series

PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
UNPLACED = dict.fromkeys(PLANE)
SHAPE = (8, 13, 11)  # 143 pixels a plane, an odd number


def volume(shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def test_sizes_photometric_and_samples_that_differ(tmp_path):
    folder = series(tmp_path / "a", volume())
    rgb(folder / "3.dcm", colours((13, 11)))
    assert "3.dcm" in refusal(folder)
    folder = series(tmp_path / "b", volume())
    write_slice(folder / "3.dcm", volume()[3][:5], (-5, 2, 109.0))
    assert "3.dcm" in refusal(folder)
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    folder = series(tmp_path / "c", volume().astype(np.uint16))
    write_slice(folder / "3.dcm", volume()[3].astype(np.uint16), (-5, 2, 109.0), tags=tags)
    assert "3.dcm" in refusal(folder)


def test_units_that_differ_and_decimals_that_do_not(tmp_path):
    def unit(index):
        return {"tags": {"RescaleType": "US" if index == 3 else "HU"}}

    assert "units: 3.dcm US" in refusal(series(tmp_path / "a", volume(), change=unit))

    def rounded(index):
        row = [1, 0.0004 * (index % 3), 0, 0, 1, 0]
        return {"tags": {"ImageOrientationPatient": row}, "spacing": (0.8 + index * 1e-4, 0.7, 3)}

    scan = read_scan(series(tmp_path / "b", volume(), change=rounded))
    np.testing.assert_array_equal(scan.array, volume())


def test_doubts_are_noted(tmp_path):
    folder = series(tmp_path / "a", volume(), tags={"PixelSpacing": None})
    assert any("PixelSpacing" in note for note in read_scan(folder).notes)
    change = lambda i: {"tags": {"FrameOfReferenceUID": f"1.2.{1 + i // 4}"}}  # noqa: E731
    notes = read_scan(series(tmp_path / "b", volume(), change=change)).notes
    assert any("2 frames of reference" in note for note in notes)
    tags = UNPLACED | {"PixelAspectRatio": ["2", "1"]}
    notes = read_scan(write_slice(tmp_path / "a.dcm", volume()[0], tags=tags)).notes
    assert any("2:1" in note for note in notes)


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

    scan = read_scan(series(tmp_path / "a", volume(), change=place, direction=direction))
    np.testing.assert_array_equal(scan.array, volume())
    assert scan.spacing == pytest.approx((2.5, 0.7, 0.8))
    np.testing.assert_allclose(np.reshape(scan.affine[2], (3, 3)), direction, atol=1e-9)


def test_decreasing_and_shuffled_slices(tmp_path):
    order = np.random.default_rng(1).permutation(8)

    def shuffled(index):
        return {"plane": volume()[order[index]], "position": (1, 2, -3.0 * order[index])}

    scan = read_scan(series(tmp_path / "a", volume(), change=shuffled))
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
            (-5, 2, 100 + 3.0 * index),
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


def test_rounding_that_does_not_add_up_and_one_that_does(tmp_path):
    folder = series(
        tmp_path / "a", volume(), change=lambda i: {"position": (0, 0, round(i * 1.25, 1))}
    )
    assert read_scan(folder).spacing[0] == pytest.approx(8.8 / 7, abs=1e-6)
    drift = np.cumsum([0, *[1.0] * 10, *[1.15] * 10])
    folder = series(
        tmp_path / "b", volume((21, 13, 11)), change=lambda i: {"position": (0, 0, drift[i])}
    )
    assert "not evenly spaced" in refusal(folder)


def test_a_slice_missing_beside_the_end(tmp_path):
    folder = series(tmp_path / "a", volume())
    (folder / "6.dcm").unlink()
    assert "not evenly spaced" in refusal(folder)


def test_spacing_between_slices_that_differs_from_positions_is_noted(tmp_path):
    scan = read_scan(series(tmp_path / "a", volume(), tags={"SpacingBetweenSlices": "6"}))
    assert scan.spacing[0] == 3.0
    assert any("SpacingBetweenSlices" in note for note in scan.notes)


@pytest.mark.parametrize(
    "keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"]
)
def test_one_slice_that_lacks_its_place(tmp_path, keyword):
    folder = series(
        tmp_path / "a", volume(), change=lambda i: {"tags": {keyword: None} if i == 3 else {}}
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

    scan = read_scan(series(tmp_path / "a", volume(), change=place))
    assert scan.spacing[0] == pytest.approx(2.5, rel=1e-3)
    axes = np.reshape(scan.affine[2], (3, 3))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)


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


def test_nuclear_medicine_states_its_step(tmp_path):
    tags = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.20", "Modality": "NM"}
    tags |= {"SpacingBetweenSlices": "4.5", "SliceThickness": "4.5"}
    detector = item(ImagePositionPatient=[1, 2, 3], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    tags |= {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    tags |= {"DetectorInformationSequence": detector}
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume(), tags=tags))
    np.testing.assert_array_equal(scan.array, volume())
    np.testing.assert_allclose(scan.spacing, (4.5, 0.7, 0.8))
    assert scan.affine[0] == (1, 2, 3)
    assert any("SpacingBetweenSlices" in note for note in scan.notes)
    order = [3, 1, 8, 2, 5, 4, 7, 6]
    path = write_slice(tmp_path / "a.dcm", volume(), tags=tags | {"SliceVector": order})
    np.testing.assert_array_equal(read_scan(path).array, volume()[np.argsort(order)])
    path = write_slice(tmp_path / "b.dcm", volume(), tags=tags | {"PhaseVector": [1, 2] * 4})
    assert "PhaseVector (2 values)" in refusal(path)
