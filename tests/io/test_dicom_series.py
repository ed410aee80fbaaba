"""Series of DICOM files: order, geometry, scaling by slice, and those that are no volume."""

import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.io.dicom import list_series
from medsam_jax.io.scans import read_scan
from tests.io.dicom_files import write_slice

CORONAL = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).T


def volume(shape=(6, 16, 20)):
    return np.random.default_rng(0).integers(0, 900, shape).astype(np.uint16)


def write(folder, array, change=None, step=3.0, **options):
    """Writes slices along z; `change(index)` returns options of one slice."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, plane in enumerate(array):
        own = {"position": (-5.0, 2.0, round(100 + step * index, 4)), "number": index + 1}
        own |= options | (change(index) if change else {})
        write_slice(folder / f"{index}.dcm", own.pop("plane", plane), **own)
    return folder


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        read_scan(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_scaling_of_each_slice(tmp_path):
    array = volume()
    pet = write(tmp_path / "pet", array, lambda i: {"scaling": (1, 0) if i == 0 else (0.01, 0)})
    found = read_scan(pet).array
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[1:], array[1:] * 0.01, rtol=1e-6)
    np.testing.assert_allclose(found[0], array[0])
    ct = write(tmp_path / "ct", array, lambda i: {"scaling": (1, 0 if i == 0 else -1024)})
    found = read_scan(ct).array
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[1:], array[1:].astype(int) - 1024)


def test_slices_of_other_pixel_types(tmp_path):
    array = volume()
    array[2] = 65000

    def signed(index):
        return {"plane": array[index].astype(np.int16)} if index == 0 else {}

    np.testing.assert_array_equal(read_scan(write(tmp_path / "a", array, signed)).array, array)


@pytest.mark.parametrize("bad", [0, 3, 5])
@pytest.mark.parametrize("kept", [0, -100, 400, 140])
def test_a_cut_file_is_named(tmp_path, bad, kept):
    folder = write(tmp_path / "a", volume())
    file = folder / f"{bad}.dcm"
    file.write_bytes(file.read_bytes()[:kept])
    assert refused(folder).startswith(f"{file}: ")


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_another_orientation_is_named(tmp_path, bad):
    folder = write(tmp_path / "a", volume(), lambda i: {"direction": CORONAL} if i == bad else {})
    assert f"differ in orientation: {bad}.dcm" in refused(folder)


def test_sizes_and_spacings_that_differ_are_named(tmp_path):
    array = volume()
    folder = write(tmp_path / "a", array, lambda i: {"plane": array[i][:8]} if i == 0 else {})
    assert "differ in size: 0.dcm 8 x 20; the other 5 16 x 20" in refused(folder)
    folder = write(tmp_path / "b", array, lambda i: {"spacing": (1, 1, 3)} if i == 5 else {})
    assert "differ in pixel spacing: 5.dcm" in refused(folder)


def test_gantry_tilt(tmp_path):
    cosine, sine = np.cos(np.radians(20)), np.sin(np.radians(20))
    tilted = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]]).T
    text = refused(write(tmp_path / "a", volume(), direction=tilted))
    assert "tilted by 20.0 degrees" in text
    assert "resample" in text


def test_rounded_positions(tmp_path):
    def place(index):
        return {"position": (0, 0, round(100 + 0.625 * index, 1))}

    scan = read_scan(write(tmp_path / "a", volume((10, 16, 20)), place))
    assert scan.spacing[0] == pytest.approx(5.6 / 9)
    assert any("0.6 to 0.7 mm" in note for note in scan.notes)


def test_spacing_is_measured_and_not_the_thickness(tmp_path):
    scan = read_scan(write(tmp_path / "a", volume(), spacing=(0.8, 0.7, 5.0), step=2.5))
    assert scan.spacing == pytest.approx((2.5, 0.7, 0.8))
    assert scan.notes == ()


def test_several_slices_at_a_position(tmp_path):
    def echo(index):
        tags = {"EchoTime": str(10 * (1 + index % 2))}
        return {"position": (0, 0, 3.0 * (index // 2)), "tags": tags}

    text = refused(write(tmp_path / "a", volume(), echo))
    assert "6 slices lie at 3 positions, 2 at each" in text
    assert "EchoTime" in text


def test_copies_are_taken_once(tmp_path):
    folder = write(tmp_path / "a", volume())
    (folder / "copy.dcm").write_bytes((folder / "2.dcm").read_bytes())
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.array, volume())
    assert any("copy.dcm" in note for note in scan.notes)
    assert [len(files) for files in list_series(folder).values()] == [6]


def test_a_series_without_positions_is_refused(tmp_path):
    gone = {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    assert "6 slices state no position" in refused(write(tmp_path / "a", volume(), tags=gone))
