"""MedSAM's `.npz`: types, spacing, and what is refused."""

import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.io import scans

ARRAY = np.arange(192).reshape(4, 6, 8)


def save(folder, **arrays):
    np.savez_compressed(folder / "a.npz", **arrays)
    return folder / "a.npz"


@pytest.mark.parametrize("dtype", ["u1", ">i2", "f2", "f4", "f8", "i8", "g"])
def test_types(tmp_path, dtype):
    array = (ARRAY / 2).astype(dtype)
    scan = scans.read_scan(save(tmp_path, imgs=array, spacing=(0.5, 0.7, 3.0)))
    np.testing.assert_array_equal(scan.array, array)
    assert scan.array.dtype.isnative
    assert scan.array.dtype.itemsize in (1, 2, 4, 8)
    assert scan.array.dtype != np.float16


@pytest.mark.parametrize("spacing", [(np.nan,) * 3, (0.5, 0.7, np.nan)])
def test_unknown_spacing_stays_unknown(tmp_path, spacing):
    scan = scans.read_scan(save(tmp_path, imgs=ARRAY, spacing=spacing))
    np.testing.assert_array_equal(scan.spacing, spacing[::-1])
    assert scan.affine is None
    assert "spacing is not known" in scan.notes[0]


def test_a_mask_of_truth_values(tmp_path):
    path = save(tmp_path, imgs=ARRAY, gts=ARRAY > 99)
    mask = scans.read_mask(path, scans.read_scan(path))
    np.testing.assert_array_equal(mask, ARRAY > 99)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imgs": np.where(ARRAY == 5, np.nan, ARRAY)}, "1 voxels are NaN"),
        ({"imgs": np.where(ARRAY == 5, -np.inf, ARRAY).astype("f2")}, "1 voxels are NaN"),
        ({"imgs": ARRAY.astype("c8")}, "imgs has type complex64"),
        ({"imgs": ARRAY.astype("U3")}, "imgs has type <U3"),
        ({"imgs": ARRAY[:0]}, "no voxels"),
        ({"imgs": ARRAY[..., None].repeat(4, -1)}, "expected .Z, Y, X."),
        ({"imgs": ARRAY, "spacing": (1, 2)}, r"spacing \[1, 2\].*positive mm"),
        ({"imgs": ARRAY, "spacing": (1, 2, -3)}, r"spacing \[1, 2, -3\].*positive mm"),
        ({"imgs": ARRAY, "spacing": (1, 2, np.inf)}, r"positive mm"),
        ({"gts": ARRAY}, "has no array 'imgs' .found gts.; store it as 'imgs'"),
    ],
)
def test_what_is_refused(tmp_path, arrays, message):
    path = save(tmp_path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        scans.read_scan(path)
    assert str(error.value).startswith(str(path))


def test_nan_in_a_mask(tmp_path):
    path = save(tmp_path, imgs=ARRAY, gts=np.where(ARRAY == 5, np.nan, ARRAY))
    with pytest.raises(UserError, match="1 voxels are no whole labels"):
        scans.read_mask(path, scans.read_scan(path))
