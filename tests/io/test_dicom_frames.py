"""Multi-frame DICOM files: order, scaling and place of each frame."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medsam_jax.io.scans import read_scan
from tests.io.dicom_files import write_slice
from tests.io.test_dicom_series import refused, volume

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
CLASSIC = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")


def item(**values) -> Sequence:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return Sequence([dataset])


def enhanced(path, array, depths, slopes=None, per_frame=None, **tags):
    """Writes frames at these depths; `per_frame(index)` returns further groups of one."""
    groups = []
    for index, depth in enumerate(depths):
        group = Dataset()
        group.PlanePositionSequence = item(ImagePositionPatient=[-5.0, 2.0, depth])
        group.FrameContentSequence = item(StackID="1", InStackPositionNumber=index + 1)
        slope = slopes[index] if slopes else 1
        group.PixelValueTransformationSequence = item(
            RescaleSlope=slope, RescaleIntercept=-1024, RescaleType="HU"
        )
        for keyword, value in (per_frame(index) if per_frame else {}).items():
            setattr(group, keyword, value)
        groups.append(group)
    shared = item(
        PixelMeasuresSequence=item(PixelSpacing=[0.7, 0.8], SliceThickness=9),
        PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    tags = dict.fromkeys(CLASSIC) | {
        "SOPClassUID": ENHANCED_CT,
        "SharedFunctionalGroupsSequence": shared,
        "PerFrameFunctionalGroupsSequence": Sequence(groups),
        **tags,
    }
    return write_slice(path, array, tags=tags)


def test_frames_in_the_order_of_their_positions(tmp_path):
    array, order = volume(), [3, 0, 5, 1, 4, 2]
    path = enhanced(tmp_path / "a.dcm", array[order], [100 + 3.0 * place for place in order])
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array, array.astype(int) - 1024)
    assert scan.spacing == pytest.approx((3.0, 0.7, 0.8))
    assert scan.affine[0] == (-5.0, 2.0, 100.0)


def test_slope_of_each_frame(tmp_path):
    array, slopes = volume(), [1, 2, 1, 3, 1, 2]
    scan = read_scan(enhanced(tmp_path / "a.dcm", array, 3.0 * np.arange(6), slopes))
    expected = array.astype(int) * np.reshape(slopes, (6, 1, 1)) - 1024
    np.testing.assert_array_equal(scan.array, expected)


def test_phases_and_stacks_are_refused(tmp_path):
    depths = [0.0, 3.0, 6.0] * 2
    text = refused(
        enhanced(
            tmp_path / "a.dcm",
            volume(),
            depths,
            per_frame=lambda i: {"MREchoSequence": item(EffectiveEchoTime=5.0 + i // 3)},
        )
    )
    assert "6 slices lie at 3 positions, 2 at each, which differ in EffectiveEchoTime" in text

    def stack(index):
        return {"FrameContentSequence": item(StackID=str(1 + index // 3))}

    text = refused(enhanced(tmp_path / "b.dcm", volume(), 3.0 * np.arange(6), per_frame=stack))
    assert "2 stacks of frames (StackID 1, 2)" in text


def test_a_frame_that_is_not_described(tmp_path):
    path = enhanced(tmp_path / "a.dcm", volume(), 3.0 * np.arange(5))
    assert "describes 5 of its 6 frames" in refused(path)


def test_older_frames_have_no_mm_between_them(tmp_path):
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume()))
    np.testing.assert_array_equal(scan.array, volume())
    np.testing.assert_array_equal(scan.spacing, (np.nan, 0.7, 0.8))
    assert scan.affine is None
    assert "file's order" in scan.notes[0]


def test_dose_grid(tmp_path):
    tags = {"GridFrameOffsetVector": [0, -2, -4, -6, -8, -10], "DoseGridScaling": "0.001"}
    scan = read_scan(write_slice(tmp_path / "a.dcm", volume(), tags=tags))
    np.testing.assert_allclose(scan.array, volume()[::-1] * 0.001, rtol=1e-6)
    assert scan.spacing[0] == pytest.approx(2.0)
