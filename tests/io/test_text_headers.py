"""NRRD and MetaImage: what the header does not say stays unknown; data files are looked for."""

import gzip

import numpy as np
import pytest
import SimpleITK as sitk

from medsam_jax.errors import UserError
from medsam_jax.io import scans

ARRAY = np.arange(192, dtype=np.int16).reshape(4, 6, 8)
NRRD = "type: short\ndimension: 3\nsizes: 8 6 4\nendian: little\n"
META = "ObjectType = Image\nNDims = 3\nDimSize = 8 6 4\nElementType = MET_SHORT\n"


def nrrd(path, fields="", encoding="raw", array=ARRAY):
    data = gzip.compress(array.tobytes()) if encoding == "gzip" else array.tobytes()
    header = f"NRRD0004\n{NRRD}encoding: {encoding}\n{fields}\n"
    path.write_bytes(header.encode() + data)
    return path


def meta(path, fields="", data="v.raw"):
    ARRAY.tofile(path.parent / "v.raw")
    path.write_text(f"{META}{fields}ElementDataFile = {data}\n")
    return path


@pytest.mark.parametrize(
    ("fields", "spacing"),
    [
        ("", (np.nan,) * 3),
        ("spacings: nan nan nan\n", (np.nan,) * 3),
        ("spacings: 0.5 0.75 nan\n", (np.nan, 0.75, 0.5)),
        ("spacings: 0.5 0.75 3\n", (3, 0.75, 0.5)),
        (
            "space: left-posterior-superior\n"
            "space directions: (0.5,0,0) (0,0.75,0) (0,0,3)\nspace origin: (1,2,3)\n",
            (3, 0.75, 0.5),
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_spacing_of_a_nrrd(tmp_path, fields, spacing, encoding):
    scan = scans.read_scan(nrrd(tmp_path / "a.nrrd", fields, encoding))
    np.testing.assert_array_equal(scan.array, ARRAY)
    np.testing.assert_array_equal(scan.spacing, spacing)
    is_known = np.isfinite(spacing).all()
    assert (scan.affine is not None) == is_known
    assert ("states no spacing" in "".join(scan.notes)) == (not is_known)


@pytest.mark.parametrize(
    ("fields", "spacing"),
    [
        ("", (np.nan,) * 3),
        ("ElementSpacing = 0.5 0.75 3\n", (3, 0.75, 0.5)),
        ("ElementSize = 0.5 0.75 3\n", (3, 0.75, 0.5)),
    ],
)
def test_spacing_of_a_metaimage(tmp_path, fields, spacing):
    scan = scans.read_scan(meta(tmp_path / "a.mhd", fields))
    np.testing.assert_array_equal(scan.array, ARRAY)
    np.testing.assert_array_equal(scan.spacing, spacing)
    assert (scan.affine is None) == np.isnan(spacing).any()


@pytest.mark.parametrize(
    ("unit", "factor"), [("um", 0.001), ("cm", 10), ("mm", 1), ("microns", 0.001)]
)
def test_units_of_a_nrrd(tmp_path, unit, factor):
    fields = "space: left-posterior-superior\nspace directions: (5,0,0) (0,5,0) (0,0,30)\n"
    fields += f'space units: "{unit}" "{unit}" "{unit}"\nspace origin: (1,2,3)\n'
    scan = scans.read_scan(nrrd(tmp_path / "a.nrrd", fields))
    np.testing.assert_allclose(scan.spacing, np.array([30, 5, 5]) * factor)
    np.testing.assert_allclose(scan.affine[0], np.array([1, 2, 3]) * factor)


@pytest.mark.parametrize(("unit", "factor"), [("um", 0.001), ("cm", 10), ("mm", 1)])
def test_units_of_a_metaimage(tmp_path, unit, factor):
    fields = f"ElementSpacing = 5 5 30\nOffset = 1 2 3\nDistanceUnits = {unit}\n"
    scan = scans.read_scan(meta(tmp_path / "a.mhd", fields))
    np.testing.assert_allclose(scan.spacing, np.array([30, 5, 5]) * factor)
    np.testing.assert_allclose(scan.affine[0], np.array([1, 2, 3]) * factor)


def compressed(folder, damage):
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY), str(folder / "c.mha"), useCompression=True)
    (folder / "c.mha").write_bytes(damage((folder / "c.mha").read_bytes()))
    return folder / "c.mha"


def detached(folder, data, fields=""):
    (folder / "a.nhdr").write_text(f"NRRD0004\n{NRRD}encoding: raw\n{fields}data file: {data}\n")
    return folder / "a.nhdr"


def test_detached_nrrd(tmp_path):
    ARRAY.tofile(tmp_path / "v.raw")
    scan = scans.read_scan(detached(tmp_path, "v.raw", "spacings: 1 2 3\n"))
    np.testing.assert_array_equal(scan.array, ARRAY)
    for number, plane in enumerate(ARRAY):
        plane.tofile(tmp_path / f"p{number}.raw")
    np.testing.assert_array_equal(scans.read_scan(detached(tmp_path, "p%d.raw 0 3 1")).array, ARRAY)
    listed = "LIST\np0.raw\np1.raw\np2.raw\np3.raw"
    np.testing.assert_array_equal(scans.read_scan(detached(tmp_path, listed)).array, ARRAY)


def short(path):
    path.write_bytes(path.read_bytes()[:-40])
    return path


def short_data(path):
    short(path.parent / "v.raw")
    return path


def vectors(folder, dtype, channels, suffix=".nrrd"):
    array = np.arange(192 * channels).reshape(4, 6, 8, channels).astype(dtype)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(folder / f"v{suffix}"))
    return folder / f"v{suffix}"


def nrrd_sheared(folder):
    fields = "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0.5,3)\n"
    return nrrd(folder / "a.nrrd", fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: meta(f / "a.mhd", data="w.raw"), "data file w.raw is missing; copy it beside"),
        (lambda f: short_data(meta(f / "a.mhd")), "v.raw truncated: 344 bytes of 384"),
        (lambda f: detached(f, "w.raw"), "data file w.raw is missing; copy it beside"),
        (lambda f: short_data(detached(meta(f / "a.mhd").parent, "v.raw")), "344 bytes of 384"),
        (lambda f: short(nrrd(f / "a.nrrd")), "a.nrrd truncated: 344 bytes of 384"),
        (lambda f: nrrd(f / "a.nrrd", "spacings: 0 1 1\n"), "says 0 x 1 x 1 mm a voxel"),
        (lambda f: nrrd(f / "a.nrrd", "spacings: 1 1\n"), "3 sizes, 2 spacings"),
        (lambda f: meta(f / "a.mhd", "ElementSpacing = 1 -1 1\n"), "says 1 x -1 x 1 mm a voxel"),
        (lambda f: compressed(f, lambda data: data[:-20]), "truncated"),
        (
            lambda f: compressed(f, lambda data: data[:-40] + b"\0" * 40),
            "or damaged: .* bytes of 384",
        ),
        (lambda f: meta(f / "a.mhd", "DistanceUnits = px\nElementSpacing = 1 1 1\n"), "units are"),
        (nrrd_sheared, r"sheared by 9.5 degrees"),
        (lambda f: vectors(f, "f4", 3), "3 values of type float32 per voxel, which are no colours"),
        (lambda f: vectors(f, "u1", 4), "has 4 values per voxel"),
        (lambda f: vectors(f, "u1", 2), "has 2 values per voxel"),
        (lambda f: vectors(f, "f4", 3, ".mha"), "which are no colours"),
        (lambda f: vectors(f, "u1", 4, ".mha"), "has 4 values per voxel"),
    ],
)
def test_bad_headers(tmp_path, make, message, capfd):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        scans.read_scan(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("kind", ["list", "3-vector"])
def test_three_values_that_are_no_colours(tmp_path, kind):
    path = vectors(tmp_path, "u1", 3)
    path.write_bytes(path.read_bytes().replace(b"kinds: vector", f"kinds: {kind}".encode()))
    with pytest.raises(UserError, match=f"3 values per voxel of the kind {kind}, which are no"):
        scans.read_scan(path)


def test_colours_of_a_nrrd(tmp_path):
    scan = scans.read_scan(vectors(tmp_path, "u1", 3))
    assert scan.array.shape == (4, 6, 8, 3)
    path = vectors(tmp_path, "u1", 4)
    path.write_bytes(path.read_bytes().replace(b"kinds: vector", b"kinds: RGBA-color"))
    assert scans.read_scan(path).array[0, 0, 0].tolist() == [0, 1, 2]


def test_a_mask_without_spacing_is_taken_voxel_by_voxel(tmp_path):
    image = sitk.GetImageFromArray(ARRAY)
    image.SetSpacing((0.5, 0.75, 3.0))
    sitk.WriteImage(image, str(tmp_path / "i.nrrd"))
    labels = (ARRAY % 3).astype(np.int16)
    mask = scans.read_mask_scan(
        nrrd(tmp_path / "m.nrrd", array=labels), scans.read_scan(tmp_path / "i.nrrd")
    )
    np.testing.assert_array_equal(mask.array, labels)
    assert "states no spacing" in mask.notes[0]
    assert mask.notes[1] == "The mask states no position; the mask is taken voxel by voxel."
