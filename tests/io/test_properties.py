"""Files of other libraries come back with the same voxels in the same place.

Random geometry (rotations, flips, exchanged axes), pixel types, slopes, slice orders and
compressions, written by SimpleITK, nibabel, pydicom, Pillow and tifffile.
"""

import contextlib
import pathlib
import tempfile

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import generate_uid

from medsam_jax.errors import UserError
from medsam_jax.io import scans
from medsam_jax.io.geometry import Scan
from tests.io.dicom_files import DEFLATED, EXPLICIT, IMPLICIT, RLE, write_slice

PROFILE = settings(derandomize=True, deadline=None, max_examples=40, database=None)
TYPES = ("uint8", "int16", "uint16", "int32", "float32", "float64")
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0])


@st.composite
def grids(draw):
    """A shape [Z, Y, X], and spacing, direction (columns) and origin in x, y, z order."""
    shape = tuple(draw(st.lists(st.integers(2, 6), min_size=3, max_size=3)))
    spacing = np.array(draw(st.lists(st.integers(100, 7000), min_size=3, max_size=3))) / 1000
    origin = np.array(draw(st.lists(st.integers(-3000, 3000), min_size=3, max_size=3))) / 10
    columns = draw(st.permutations(range(3)))
    signs = draw(st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3))
    angles = draw(st.lists(st.sampled_from([0, 0, 0, 7, -20, 33]), min_size=3, max_size=3))
    direction = np.eye(3)[:, columns] * signs
    for axis, angle in enumerate(np.radians(angles)):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        direction = turn @ direction
    return shape, spacing, direction, origin


def voxels(shape, dtype, seed):
    """Values that fill a type; whole numbers for floats, so that they are exact."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    low, high = -40000, 40000
    if dtype.kind != "f":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


def assert_same_place(scan: Scan, array, spacing, direction, origin, rtol=0.0):
    """Each voxel that was written is at the same point of the patient, with the same value.

    The reader may store the axes in another order or direction.
    """
    at = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), -1).reshape(-1, 3)
    points = origin + (at[:, ::-1] * spacing) @ np.transpose(direction)
    found_origin, found_spacing, found_direction = map(np.array, scan.affine)
    matrix = found_direction.reshape(3, 3) * found_spacing
    index = np.linalg.solve(matrix, (points - found_origin).T).T[:, ::-1]
    nearest = np.round(index).astype(int)
    np.testing.assert_allclose(index, nearest, atol=0.01)  # of a voxel: NIfTI rounds to float32
    assert scan.array.shape == tuple(nearest.max(axis=0) + 1)
    assert nearest.min() == 0
    np.testing.assert_allclose(scan.array[tuple(nearest.T)], array.ravel(), rtol=rtol)
    np.testing.assert_allclose(scan.spacing, found_spacing[::-1])


def to_sitk(array, spacing, direction, origin):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(origin.tolist())
    return image


@PROFILE
@given(
    grids(),
    st.sampled_from(["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mhd"]),
    st.sampled_from(TYPES),
    st.booleans(),
)
def test_written_by_simpleitk(grid, name, dtype, compress):
    shape, *geometry = grid
    array = voxels(shape, dtype, 0)
    with folder() as path:
        sitk.WriteImage(to_sitk(array, *geometry), str(path / name), useCompression=compress)
        scan = scans.read_scan(path / name)
    assert_same_place(scan, array, *geometry)
    if scan.array.dtype != array.dtype:
        assert scan.array.dtype.kind == array.dtype.kind


@PROFILE
@given(
    grids(),
    st.sampled_from(["a.nii", "a.nii.gz"]),
    st.sampled_from(["uint8", "int16", "uint16", "int32"]),
    st.sampled_from([(1.0, 0.0), (0.5, -1024.0), (2.0, 0.0), (0.01, 3.0), (-1.0, 0.0)]),
    st.sampled_from(["sform", "qform", "both"]),
    st.sampled_from("<>"),
)
def test_written_by_nibabel(grid, name, dtype, scaling, forms, order):
    shape, spacing, direction, origin = grid
    stored = voxels(shape, dtype, 1) // 4
    slope, intercept = scaling
    affine = np.eye(4)
    affine[:3, :3] = LPS_FROM_RAS @ direction * spacing
    affine[:3, 3] = LPS_FROM_RAS @ origin
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    values = stored * slope + intercept
    image = nibabel.Nifti1Image(stored.T, affine, header)
    image.header.set_data_dtype(dtype)
    image.header.set_slope_inter(slope, intercept)
    image.set_sform(affine, 1 if forms != "qform" else 0)
    image.set_qform(affine, 1 if forms != "sform" else 0)
    with folder() as path:
        nibabel.save(image, path / name)
        written = np.asarray(nibabel.load(path / name).dataobj).T
        scan = scans.read_scan(path / name)
    np.testing.assert_allclose(written, values, rtol=1e-6)  # the test wrote what it meant
    assert_same_place(scan, values, spacing, direction, origin, rtol=1e-5)  # float32


@PROFILE
@given(
    grids(),
    st.sampled_from([("int16", 16), ("int16", 12), ("uint16", 12), ("uint16", 16), ("uint8", 8)]),
    st.sampled_from([None, (1.0, -1024.0), (0.5, 0.0), (2.5, 7.0)]),
    st.sampled_from([IMPLICIT, EXPLICIT, DEFLATED, RLE]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_written_by_pydicom(grid, kind, scaling, syntax, by_slice, random):
    """Shuffled names and numbers; with `by_slice` every slice has a slope of its own, as in PET."""
    shape, spacing, direction, origin = grid
    dtype, bits = kind
    if syntax == RLE:  # GDCM refuses RLE of fewer than 256 bytes or so
        shape = (shape[0], shape[1] + 14, shape[2] + 14)
    array = voxels(shape, dtype, 2) // 2 ** (np.dtype(dtype).itemsize * 8 - bits)
    # A DICOM slice has no third direction: slices are stacked along the normal, up or down.
    normal = np.cross(direction[:, 0], direction[:, 1])
    direction = np.stack([*direction.T[:2], normal * random.choice([1, -1])], axis=1)
    names = list(range(shape[0]))
    random.shuffle(names)
    uid, values = generate_uid(), array.astype(float)
    with folder() as path:
        for index, plane in enumerate(array):
            scale = scaling
            if scaling is not None and by_slice:
                scale = (scaling[0] * (1 + index / 4), scaling[1])
            if scale is not None:
                values[index] = plane * scale[0] + scale[1]
            position = origin + direction[:, 2] * spacing[2] * index
            file = path / f"{names[index]}.dcm"
            number = names[index] + 1
            write_slice(file, plane, position, direction, spacing, number, uid, scale, syntax, bits)
        pydicom.dcmread(path / "0.dcm").pixel_array  # noqa: B018 (what was written can be read)
        scan = scans.read_scan(path)
    # float32 of the reader
    assert_same_place(scan, values, spacing, direction, origin, rtol=1e-5)


@PROFILE
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([("L", 0), ("RGB", 3), ("RGBA", 4), ("I;16", 0), ("P", 0), ("LA", 2)]),
    st.sampled_from(["a.png", "a.tif"]),
    st.booleans(),
)
def test_written_by_pillow(height, width, mode, name, optimize):
    mode, channels = mode
    rng = np.random.default_rng(height * width)
    shape = (height, width, channels) if channels else (height, width)
    if mode == "I;16":
        array = rng.integers(0, 65536, shape).astype(np.uint16)
    else:
        array = rng.integers(0, 256, shape).astype(np.uint8)
    picture = Image.fromarray(array)
    expected = array[..., 0] if mode == "LA" else array[..., :3]
    if mode == "P":
        palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
        picture.putpalette(palette.tobytes())
        expected = palette[array]
    if mode == "LA" and name == "a.tif":
        picture = Image.fromarray(array[..., 0])
    if channels == 0 and mode != "P":
        expected = array
    with folder() as path:
        picture.save(path / name, **({"optimize": True} if name == "a.png" and optimize else {}))
        found = scans.read_scan(path / name)
    assert found.affine is None
    assert np.isnan(found.spacing).all()
    if expected.ndim == 3 and found.array.ndim == 3:  # equal colours become one channel
        assert (expected == expected[..., :1]).all()
        expected = expected[..., 0]
    np.testing.assert_array_equal(found.array[0], expected)


@PROFILE
@given(
    st.integers(1, 3),
    st.integers(2, 9),
    st.integers(5, 9),
    st.sampled_from(["uint8", "uint16", "int16", "float32"]),
    st.sampled_from(["grey", "contig", "separate"]),
    st.sampled_from([None, "zlib"]),
    st.sampled_from("<>"),
)
def test_written_by_tifffile(pages, height, width, dtype, layout, compression, order):
    if layout == "separate":
        shape, colours = (pages, 3, height, width), {"photometric": "rgb", "planarconfig": layout}
    elif layout == "contig":
        shape, colours = (pages, height, width, 3), {"photometric": "rgb", "planarconfig": layout}
    else:
        shape, colours = (pages, height, width), {"photometric": "minisblack"}
    array = voxels(shape, dtype, 4)
    expected = np.moveaxis(array, 1, -1) if layout == "separate" else array
    with folder() as path:
        with tifffile.TiffWriter(path / "a.tif", byteorder=order) as writer:
            for page in array:
                writer.write(page, compression=compression, metadata=None, **colours)
        if layout != "grey" and dtype in ("int16", "float32"):  # no colours of a picture
            with contextlib.suppress(UserError):
                np.testing.assert_array_equal(scans.read_scan(path / "a.tif").array, expected)
            return
        scan = scans.read_scan(path / "a.tif")
    np.testing.assert_array_equal(scan.array, expected)


@PROFILE
@given(
    grids(),
    st.permutations(range(3)),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.sampled_from(["m.nii.gz", "m.nrrd", "m.mha"]),
)
def test_a_mask_on_a_turned_grid_comes_back_on_the_image(grid, order, flips, name):
    """The mask holds the same points of the patient, in another order of axes."""
    shape, spacing, direction, origin = grid
    labels = np.random.default_rng(5).integers(0, 4, shape).astype(np.uint8)
    labels[0, 0, 0] = 3
    # `order` and `flips` are of the axes x, y, z; arrays are [Z, Y, X].
    last = np.array(shape[::-1]) - 1
    turned_origin = origin + direction @ (spacing * last * flips)
    turned_direction = (direction * np.where(flips, -1, 1))[:, order]
    turned = np.flip(labels.T, [axis for axis in range(3) if flips[axis]]).transpose(order).T
    with folder() as path:
        image = to_sitk(voxels(shape, "int16", 6), spacing, direction, origin)
        mask = to_sitk(
            np.ascontiguousarray(turned), spacing[list(order)], turned_direction, turned_origin
        )
        sitk.WriteImage(image, str(path / "i.nrrd"))
        sitk.WriteImage(mask, str(path / name))
        found = scans.read_mask(path / name, scans.read_scan(path / "i.nrrd"))
    np.testing.assert_array_equal(found, labels)
