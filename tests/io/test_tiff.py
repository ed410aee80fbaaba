"""TIFF: every sample type, layout, compression and photometric interpretation to its values."""

import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from medsam_jax.errors import UserError
from medsam_jax.io import scans

RNG = np.random.default_rng(0)


def grey(dtype, shape=(70, 90)):
    if np.issubdtype(dtype, np.floating):
        return RNG.normal(0, 50, shape).astype(dtype)
    info = np.iinfo(dtype)
    return RNG.integers(max(info.min, -(2**31)), min(info.max, 2**31), shape).astype(dtype)


def read(path, array, **options):
    tifffile.imwrite(path, array, **options)
    return scans.read_scan(path)


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8", ">u2", ">f4"]
)
@pytest.mark.parametrize("layout", [{}, {"tile": (32, 48)}, {"rowsperstrip": 7}])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_sample_types(tmp_path, dtype, layout, compression):
    dtype = np.dtype(dtype)
    array = grey(dtype)
    order = ">" if dtype.byteorder == ">" else "<"
    scan = read(tmp_path / "a.tif", array, compression=compression, byteorder=order, **layout)
    np.testing.assert_array_equal(scan.array[0], array)
    assert scan.array.dtype.isnative
    assert scan.notes == ()
    assert np.isnan(scan.spacing).all()


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("layout", [{}, {"tile": (32, 48)}])
def test_colours_in_one_plane_and_in_three(tmp_path, dtype, planes, layout):
    array = grey(np.dtype(dtype), (70, 90, 3))
    stored = array if planes == "contig" else np.moveaxis(array, -1, 0)
    scan = read(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planes, **layout)
    np.testing.assert_array_equal(scan.array[0], array)


@pytest.mark.parametrize("predictor", [1, 2])
@pytest.mark.parametrize("compression", ["tiff_lzw", "zstd", "tiff_adobe_deflate"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "rgb"])
def test_lzw_and_zstd(tmp_path, predictor, compression, dtype):
    array = grey(np.dtype("u1"), (70, 90, 3)) if dtype == "rgb" else grey(np.dtype(dtype))
    array[20:50, 10:60] = 7
    tags = {317: predictor, 278: 16}
    Image.fromarray(array).save(tmp_path / "a.tif", compression=compression, tiffinfo=tags)
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.tif").array[0], array)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_floating_point_predictor(tmp_path, compression):
    array = grey(np.dtype("f4"))
    tags = {317: 3}
    Image.fromarray(array).save(tmp_path / "a.tif", compression=compression, tiffinfo=tags)
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.tif").array[0], array)


def test_lzw_colours_of_16_bit(tmp_path):
    """Pillow keeps 8 bits of these; OpenCV writes them by libtiff."""
    import cv2

    array = grey(np.dtype("u2"), (70, 90, 3))
    cv2.imwrite(str(tmp_path / "a.tif"), array[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.tif").array[0], array)


def test_jpeg_in_tiff(tmp_path):
    array = np.full((64, 64, 3), (200, 90, 30), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.tif", compression="jpeg", quality=100)
    found = scans.read_scan(tmp_path / "a.tif").array[0].astype(int)
    np.testing.assert_allclose(found, array, atol=3)


@pytest.mark.parametrize("compression", ["group4", "raw", "packbits"])
def test_one_bit(tmp_path, compression):
    array = grey(np.dtype("u1")) > 128
    Image.fromarray(array).save(tmp_path / "a.tif", compression=compression)
    scan = scans.read_scan(tmp_path / "a.tif")
    np.testing.assert_array_equal(scan.array[0], array * 255)
    np.testing.assert_array_equal(scans.read_mask(tmp_path / "a.tif", scan)[0], array)


@pytest.mark.parametrize("dtype", ["u1", "u2", "bool"])
def test_white_is_zero(tmp_path, dtype):
    array = grey(np.dtype("u1")) > 128 if dtype == "bool" else grey(np.dtype(dtype))
    scan = read(tmp_path / "a.tif", array, photometric="miniswhite")
    full = 1 if dtype == "bool" else np.iinfo(dtype).max
    expected = (~array * 255) if dtype == "bool" else full - array
    np.testing.assert_array_equal(scan.array[0], expected)


def test_signed_white_is_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 is white"):
        read(tmp_path / "a.tif", grey(np.dtype("i2")), photometric="miniswhite")


def packed(path, values, bits):
    """A TIFF of one strip with samples of so many bits."""
    shifts = np.arange(bits - 1, -1, -1)
    rows = (values[..., None] >> shifts & 1).astype(np.uint8).reshape(len(values), -1)
    data = np.packbits(rows, axis=1).tobytes()
    tags = {256: values.shape[1], 257: len(values), 258: bits, 259: 1, 262: 1, 273: 0, 277: 1}
    tags |= {278: len(values), 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + data)
    return path


@pytest.mark.parametrize("bits", [2, 4, 12])
def test_samples_of_other_than_whole_bytes(tmp_path, bits):
    values = RNG.integers(0, 2**bits, (6, 8))
    scan = scans.read_scan(packed(tmp_path / "a.tif", values, bits))
    np.testing.assert_array_equal(scan.array[0], values * {2: 85, 4: 17, 12: 1}[bits])
    labels = np.repeat(np.repeat(values, 8, 0), 8, 1)
    mask = packed(tmp_path / "m.tif", labels, bits)
    np.testing.assert_array_equal(scans.read_mask(mask, scans.read_scan(mask))[0], labels)


def test_other_depths_are_refused(tmp_path):
    with pytest.raises(UserError, match="10 bits, compressed as NONE; save it with 8 or 16"):
        scans.read_scan(packed(tmp_path / "a.tif", RNG.integers(0, 1024, (6, 8)), 10))


def test_palette(tmp_path):
    indices = RNG.integers(0, 3, (5, 7)).astype(np.uint8)
    palette = np.zeros((3, 256), np.uint16)
    palette[:, 1], palette[:, 2] = (65535, 0, 0), (0, 65535, 0)
    scan = read(tmp_path / "a.tif", indices, photometric="palette", colormap=palette)
    np.testing.assert_array_equal(scan.array[0, ..., 0], np.where(indices == 1, 255, 0))
    np.testing.assert_array_equal(scan.array[0, ..., 1], np.where(indices == 2, 255, 0))
    np.testing.assert_array_equal(scans.read_mask(tmp_path / "a.tif", scan)[0], indices)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "lzw", "jpeg"])
def test_orientation(tmp_path, orientation, compression):
    array = np.zeros((16, 24), np.uint8)
    array[:8, :8], array[8:, :8] = 200, 100
    path = tmp_path / "a.tif"
    Image.fromarray(array).save(
        path,
        compression={None: "raw", "lzw": "tiff_lzw", "jpeg": "jpeg"}[compression],
        tiffinfo={274: orientation},
    )
    shown = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.T,
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].T,
        8: np.rot90(array),
    }[orientation]
    np.testing.assert_allclose(scans.read_scan(path).array[0], shown, atol=3)


@pytest.mark.parametrize("height", [160, 150])
def test_stack_of_colours(tmp_path, height):
    array = grey(np.dtype("u1"), (2, height, 24, 3))
    np.testing.assert_array_equal(read(tmp_path / "a.tif", array, photometric="rgb").array, array)


def test_thumbnails_are_left_out(tmp_path):
    array, small = grey(np.dtype("u2")), grey(np.dtype("u2"), (35, 45))
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(array)
        writer.write(small, subfiletype=1)
    scan = scans.read_scan(tmp_path / "a.tif")
    np.testing.assert_array_equal(scan.array[0], array)
    assert scan.notes == ("1 of 2 pages are thumbnails or smaller copies; left out.",)


def test_pages_of_different_sizes_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(grey(np.dtype("u1")))
        writer.write(grey(np.dtype("u1"), (35, 45)))
    with pytest.raises(UserError, match="pages of different sizes"):
        scans.read_scan(tmp_path / "a.tif")


def test_alpha_is_dropped_with_a_note(tmp_path):
    array = grey(np.dtype("u1"), (70, 90, 4))
    scan = read(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(scan.array[0], array[..., :3])
    assert "Transparency" in scan.notes[0]


def test_colours_multiplied_by_alpha_are_divided(tmp_path):
    colours = RNG.integers(0, 256, (70, 90, 3))
    alpha = RNG.integers(128, 256, (70, 90, 1))
    stored = np.concatenate([np.rint(colours * alpha / 255), alpha], -1).astype(np.uint8)
    scan = read(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    np.testing.assert_allclose(scan.array[0].astype(int), colours, atol=1)


@pytest.mark.parametrize(
    ("channels", "photometric", "extra"),
    [
        (4, "rgb", ["unspecified"]),
        (5, "rgb", ["unspecified", "unspecified"]),
        (2, "minisblack", ["unspecified"]),
        (4, "minisblack", ["unspecified"] * 3),
    ],
)
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_values_that_are_no_alpha_are_refused(tmp_path, channels, photometric, extra, planes):
    array = grey(np.dtype("u1"), (70, 90, channels))
    array = array if planes == "contig" else np.moveaxis(array, -1, 0)
    with pytest.raises(UserError, match=f"{channels} values a pixel.*does not say"):
        read(
            tmp_path / "a.tif",
            array,
            photometric=photometric,
            extrasamples=extra,
            planarconfig=planes,
        )


def test_channels_of_imagej_are_no_slices(tmp_path):
    with pytest.raises(UserError, match="pages are channels, not slices"):
        read(
            tmp_path / "a.tif",
            grey(np.dtype("u2"), (2, 16, 16)),
            imagej=True,
            metadata={"axes": "CYX"},
        )


def test_slices_of_imagej(tmp_path):
    array = grey(np.dtype("u2"), (4, 16, 16))
    scan = read(tmp_path / "a.tif", array, imagej=True, metadata={"axes": "ZYX"})
    np.testing.assert_array_equal(scan.array, array)


def test_a_page_with_depth_is_refused(tmp_path):
    with pytest.raises(UserError, match="a page is a volume .ImageDepth 5."):
        read(
            tmp_path / "a.tif",
            grey(np.dtype("u2"), (5, 20, 22)),
            photometric="minisblack",
            volumetric=True,
            tile=(16, 16, 16),
        )


def test_lab_colours_are_refused(tmp_path):
    with pytest.raises(UserError, match="colours are CIELAB"):
        read(tmp_path / "a.tif", grey(np.dtype("u1"), (16, 16, 3)), photometric="cielab")


def test_cmyk(tmp_path):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 1:3] = 255  # red
    scan = read(tmp_path / "a.tif", ink, photometric="separated")
    np.testing.assert_array_equal(scan.array[0, :8], np.broadcast_to([255, 0, 0], (8, 16, 3)))
    np.testing.assert_array_equal(scan.array[0, 8:], np.full((8, 16, 3), 255))


def test_complex_is_refused(tmp_path):
    with pytest.raises(UserError, match="pixels are complex64"):
        read(tmp_path / "a.tif", np.zeros((8, 8), np.complex64))


def test_nan_is_refused(tmp_path):
    array = grey(np.dtype("f4"))
    array[3, 4] = np.nan
    with pytest.raises(UserError, match="1 voxels are NaN or infinite"):
        read(tmp_path / "a.tif", array)


def test_big_tiff(tmp_path):
    array = grey(np.dtype("u2"))
    np.testing.assert_array_equal(read(tmp_path / "a.tif", array, bigtiff=True).array[0], array)


def test_a_page_that_is_not_there_is_no_shorter_volume(tmp_path):
    """tifffile logs it and reads the pages before it."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, grey(np.dtype("u2"), (4, 16, 16)), photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        last = file.pages[3].offset
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", last), struct.pack("<I", 9999999)))
    with pytest.raises(UserError, match="invalid page offset.*export it again"):
        scans.read_scan(path)


def test_a_damaged_tag_is_no_default(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, grey(np.dtype("u2"), (16, 16)))
    content = bytearray(path.read_bytes())
    entries = struct.unpack_from("<I", content, 4)[0]
    for index in range(struct.unpack_from("<H", content, entries)[0]):
        at = entries + 2 + 12 * index
        if struct.unpack_from("<H", content, at)[0] == 258:
            struct.pack_into("<H", content, at + 2, 77)  # its data type
    path.write_bytes(content)
    with pytest.raises(UserError, match="export it again"):
        scans.read_scan(path)


def test_promised_pixels_without_bytes_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.uint8))
    content = bytearray(path.read_bytes())
    entries = struct.unpack_from("<I", content, 4)[0]
    for index in range(struct.unpack_from("<H", content, entries)[0]):
        at = entries + 2 + 12 * index
        if struct.unpack_from("<H", content, at)[0] in (256, 257):
            struct.pack_into("<HHII", content, at, *struct.unpack_from("<HHI", content, at), 65000)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged: 65000 x 65000 pixels"):
        scans.read_scan(path)
