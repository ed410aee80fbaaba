"""NIfTI headers that ITK, nibabel and the standard read differently."""

import gzip
import struct

import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.io import scans

ARRAY = np.arange(192, dtype=np.int16).reshape(4, 6, 8)
AFFINE = np.array([[0.8, 0, 0, -4], [0, 0.75, 0, 5], [0, 0, 3, 6]])
CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}
CODES |= {"i8": 1024, "u8": 1280, "c8": 32}


def write(
    path,
    array=ARRAY,
    pixdim=(0.8, 0.75, 3.0),
    sform=AFFINE,
    qform=None,  # quaternion b, c, d and origin
    codes=(0, 1),  # qform, sform
    scaling=(0.0, 0.0),
    units=2,
    datatype=None,
    intent=0,
    magic=b"n+1\0",
    order="<",
):
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    shape = array.shape[::-1]
    struct.pack_into(f"{order}8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into(f"{order}h", header, 68, intent)
    code = datatype or CODES[array.dtype.str[1:]]
    struct.pack_into(f"{order}hh", header, 70, code, array.dtype.itemsize * 8)
    struct.pack_into(f"{order}8f", header, 76, 1.0, *pixdim, *[1.0] * (7 - len(pixdim)))
    struct.pack_into(f"{order}f", header, 108, 352.0 if magic == b"n+1\0" else 0.0)
    struct.pack_into(f"{order}ff", header, 112, *scaling)
    header[123] = units
    struct.pack_into(f"{order}hh", header, 252, *codes)
    struct.pack_into(f"{order}6f", header, 256, *(qform or (0,) * 6))
    struct.pack_into(f"{order}12f", header, 280, *np.ravel(sform))
    header[344:348] = magic
    content = bytes(header) + array.astype(array.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(tmp_path, **fields):
    return scans.read_scan(write(tmp_path / "a.nii", **fields))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sample_types(tmp_path, dtype, order):
    scan = read(tmp_path, array=ARRAY.astype(dtype), order=order)
    np.testing.assert_array_equal(scan.array, ARRAY.astype(dtype))
    np.testing.assert_allclose(scan.to_ras(), AFFINE, atol=1e-6)
    assert scan.notes == ()


@pytest.mark.parametrize(("units", "factor"), [(1, 0.001), (2, 1.0), (3, 1000.0), (0, 1.0)])
def test_units_become_mm(tmp_path, units, factor):
    pixdim = np.array([0.8, 0.75, 3.0]) * factor
    scan = read(tmp_path, pixdim=pixdim, sform=AFFINE * factor, units=units)
    np.testing.assert_allclose(scan.spacing, (3.0, 0.75, 0.8), rtol=1e-6)
    np.testing.assert_allclose(scan.to_ras(), AFFINE, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "expected", "is_noted"),
    [
        ((2.0, 1.0), ARRAY * 2 + 1, False),
        ((0.0, 0.0), ARRAY, False),
        ((0.0, 5.0), ARRAY, True),  # ITK adds 5
        ((np.nan, 0.0), ARRAY, True),
        ((np.inf, 0.0), ARRAY, True),
        ((1.0, -1024.0), ARRAY - 1024, False),
    ],
)
def test_scaling(tmp_path, scaling, expected, is_noted):
    scan = read(tmp_path, scaling=scaling)
    np.testing.assert_array_equal(scan.array, expected)
    assert ("is no scaling" in "".join(scan.notes)) == is_noted


def test_forms_that_disagree_are_noted(tmp_path):
    scan = read(tmp_path, qform=(0, 0, 0, -4, 5, 26), codes=(1, 1))
    (note,) = scan.notes
    assert note == "The sform and the qform are up to 20 mm apart; the sform is used."
    np.testing.assert_allclose(scan.to_ras(), AFFINE, atol=1e-6)
    assert read(tmp_path, qform=(0, 0, 0, -4, 5, 6), codes=(1, 1)).notes == ()


def test_no_position_is_noted(tmp_path):
    scan = read(tmp_path, codes=(0, 0))
    assert "states no position" in scan.notes[0]
    np.testing.assert_allclose(scan.spacing, (3.0, 0.75, 0.8), rtol=1e-6)


def sheared(degrees):
    affine = AFFINE.copy()
    affine[1:3, 2] = 3 * np.sin(np.radians(degrees)), 3 * np.cos(np.radians(degrees))
    return affine


def test_colours(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (4, 6, 8, 3)).astype(np.uint8)
    packed = array.view("V3")[..., 0]
    header = write(tmp_path / "a.nii", np.zeros((4, 6, 8), np.uint8), datatype=128)
    content = header.read_bytes()[:352] + packed.tobytes()
    header.write_bytes(content)
    np.testing.assert_array_equal(scans.read_scan(header).array, array)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sform": sheared(0.3)}, r"sheared by 0.3 degrees; resample"),
        ({"sform": sheared(15)}, r"sheared by 15 degrees; resample"),
        ({"sform": sheared(15), "qform": (0, 0, 0, -4, 5, 6), "codes": (1, 1)}, "by 15 degrees"),
        ({"pixdim": (-0.8, 0.75, 3)}, r"says -0.8 x 0.75 x 3 mm a voxel"),
        ({"pixdim": (0.8, 0.75, np.nan)}, r"says 0.8 x 0.75 x nan mm a voxel"),
        ({"pixdim": (1, 1, 1)}, r"pixdim says 1 x 1 x 1 mm a voxel, the sform 0.8 x 0.75 x 3"),
        ({"sform": AFFINE * np.nan}, "the sform has NaN"),
        ({"qform": (np.nan, 0, 0, 0, 0, 0), "codes": (1, 0)}, "the qform has NaN"),
        ({"qform": (0.9, 0.9, 0.9, 0, 0, 0), "codes": (1, 0)}, "quaternion.*no rotation"),
        ({"sform": AFFINE * [1, 1, 1, np.inf]}, "the sform has NaN or infinity"),
        ({"scaling": (1.0, np.nan)}, "scl_inter nan"),
        ({"array": ARRAY.astype("c8")}, "voxels are complex64"),
        ({"datatype": 1536}, "voxels are float128"),
        ({"datatype": 77}, "unknown datatype 77"),
        ({"array": np.zeros((3, 1, 4, 6, 8), "f4"), "intent": 1007}, "5 dimensions.*intent 1007"),
        ({"array": np.zeros((3, 4, 6, 8), "f4")}, r"4 dimensions \(8 x 6 x 4 x 3\)"),
    ],
)
def test_headers_that_are_refused(tmp_path, fields, message, capfd):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, **fields)
    assert "\n" not in str(error.value)
    assert not capfd.readouterr().err


def test_a_pair_of_files(tmp_path):
    whole = write(tmp_path / "a.nii", magic=b"ni1\0").read_bytes()
    (tmp_path / "b.hdr").write_bytes(whole[:348])
    (tmp_path / "b.img").write_bytes(whole[352:])
    for name in ("b.hdr", "b.img"):
        scan = scans.read_scan(tmp_path / name)
        np.testing.assert_array_equal(scan.array, ARRAY)
        np.testing.assert_allclose(scan.to_ras(), AFFINE, atol=1e-6)
        assert scan.notes == ()
    (tmp_path / "b.img").write_bytes(whole[352:-20])
    with pytest.raises(UserError, match="b.img: cannot be read .truncated: 364 bytes of 384"):
        scans.read_scan(tmp_path / "b.hdr")
    (tmp_path / "b.img").unlink()
    with pytest.raises(UserError, match="other half b.img is missing"):
        scans.read_scan(tmp_path / "b.hdr")
    (tmp_path / "c.img").write_bytes(whole[352:])
    with pytest.raises(UserError, match="other half c.hdr is missing"):
        scans.read_scan(tmp_path / "c.img")


def test_a_pair_whose_voxels_begin_later_is_short(tmp_path):
    """ITK reads the missing voxels as zeros."""
    whole = bytearray(write(tmp_path / "a.nii", magic=b"ni1\0").read_bytes())
    struct.pack_into("<f", whole, 108, 352.0)
    (tmp_path / "b.hdr").write_bytes(whole[:348])
    (tmp_path / "b.img").write_bytes(whole[352:])
    with pytest.raises(UserError, match="truncated: 384 bytes of 736"):
        scans.read_scan(tmp_path / "b.hdr")


def test_analyze_has_no_position(tmp_path):
    whole = write(tmp_path / "a.nii", magic=bytes(4), codes=(0, 0)).read_bytes()
    (tmp_path / "b.hdr").write_bytes(whole[:348])
    (tmp_path / "b.img").write_bytes(whole[352:])
    scan = scans.read_scan(tmp_path / "b.hdr")
    assert scan.array.shape == ARRAY.shape
    assert "ANALYZE, which states no position" in scan.notes[0]
