"""PNG, JPEG, GIF and WebP: values, orientation, alpha, and what is refused. TIFF: test_tiff.py."""

import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from medsam_jax.errors import UserError
from medsam_jax.io import scans

RNG = np.random.default_rng(0)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def shown(array, orientation):
    return {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.swapaxes(0, 1),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(array),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [400, 416])  # 416 holds the digits 16
def test_orientation_of_a_jpeg_of_any_size(tmp_path, orientation, side):
    array = np.zeros((side, 64, 3), np.uint8)
    array[:16, :16], array[-16:, :16], array[:16, -16:] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    Image.fromarray(array).save(
        tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif(orientation)
    )
    found = scans.read_scan(tmp_path / "a.jpg").array[0].astype(int)
    assert np.abs(found - shown(array, orientation)).mean() < 1


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_orientation_of_image_and_mask(tmp_path, name, orientation, mode):
    array = np.zeros((12, 20), np.uint8)
    array[:4, :8] = 1
    picture = Image.fromarray(array * 255).convert("RGB")
    if mode == "L":
        picture = Image.fromarray(array)
    elif mode == "P" and name == "a.png":
        picture = Image.fromarray(array).convert("P")
        picture.putdata(array.ravel().tolist())
    picture.save(tmp_path / name, exif=exif(orientation), lossless=True)
    scan = scans.read_scan(tmp_path / name)
    assert scan.array.shape[1:3] == shown(array, orientation).shape
    mask = scans.read_mask(tmp_path / name, scan)
    np.testing.assert_array_equal(mask[0] > 0, shown(array, orientation) > 0)


@pytest.mark.parametrize("orientation", [1, 6, 3])
def test_orientation_of_a_deep_png(tmp_path, orientation):
    array = RNG.integers(0, 65536, (12, 20, 3)).astype(np.uint16)
    content = cv2.imencode(".png", array[..., ::-1])[1].tobytes()
    tag = b"eXIf" + exif(orientation).tobytes()[6:]
    chunk = (len(tag) - 4).to_bytes(4, "big") + tag + zlib.crc32(tag).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    found = scans.read_scan(tmp_path / "a.png").array[0]
    np.testing.assert_array_equal(found, shown(array, orientation))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("side", [160, 150])
def test_deep_png_keeps_its_bits(tmp_path, channels, side):
    array = RNG.integers(0, 65536, (side, 40, channels)).astype(np.uint16)
    order = [2, 1, 0, 3][:channels]
    cv2.imwrite(str(tmp_path / "a.png"), array[..., order])
    scan = scans.read_scan(tmp_path / "a.png")
    np.testing.assert_array_equal(scan.array[0], array[..., :3])
    assert ("Transparency" in "".join(scan.notes)) == (channels == 4)


@pytest.mark.parametrize("at", [40, 200, -30])
def test_a_damaged_deep_png_is_refused(tmp_path, at, capfd):
    cv2.imwrite(str(tmp_path / "a.png"), RNG.integers(0, 65536, (16, 17, 3)).astype(np.uint16))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[at] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        scans.read_scan(tmp_path / "a.png")
    assert not capfd.readouterr().err


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_not_stretched(tmp_path, bits):
    labels = RNG.integers(0, 2**bits, (6, 8)).astype(np.uint8)
    rows = np.unpackbits(labels[..., None], axis=-1)[..., 8 - bits :].reshape(6, -1)
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)

    def chunk(tag, data):
        body = tag + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = (8).to_bytes(4, "big") + (6).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    scan = scans.read_scan(tmp_path / "a.png")
    np.testing.assert_array_equal(scan.array[0], labels * (255 // (2**bits - 1)))
    np.testing.assert_array_equal(scans.read_mask(tmp_path / "a.png", scan)[0], labels)


@pytest.mark.parametrize("side", [160, 150])
def test_a_jpeg_called_png_is_read_with_a_note(tmp_path, side):
    array = np.full((side, 40, 3), (180, 90, 40), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png", "JPEG", quality=95)
    scan = scans.read_scan(tmp_path / "a.png")
    np.testing.assert_allclose(scan.array[0].astype(int), array, atol=2)
    assert scan.notes == ("The file is a JPEG, although it is named a.png; read as JPEG.",)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_is_refused_and_one_frame_is_read(tmp_path, name):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 250)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(UserError, match="animation of 2 frames"):
        scans.read_scan(tmp_path / name)
    frames[1].save(tmp_path / name, lossless=True)
    np.testing.assert_array_equal(scans.read_scan(tmp_path / name).array, np.full((1, 8, 8), 250))


def test_alpha_that_differs_is_noted(tmp_path):
    array = np.full((6, 6, 4), 200, np.uint8)
    array[..., 0] = 10
    Image.fromarray(array).save(tmp_path / "a.png")
    assert scans.read_scan(tmp_path / "a.png").notes == ()
    array[2, 3, 3] = 0
    Image.fromarray(array).save(tmp_path / "a.png")
    (note,) = scans.read_scan(tmp_path / "a.png").notes
    assert note == "Transparency (0 to 200) is dropped; colours are kept."


def test_cmyk_jpeg(tmp_path):
    array = np.zeros((16, 16, 3), np.uint8)
    array[:] = (255, 0, 0)
    Image.fromarray(array).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    found = scans.read_scan(tmp_path / "a.jpg").array[0].astype(int)
    np.testing.assert_allclose(found, array, atol=3)


def test_a_few_bytes_that_promise_gigabytes_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = (90000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="says 90000 x 90000 pixels in"):
        scans.read_scan(tmp_path / "a.png")


def test_resolution_tags_are_no_mm(tmp_path):
    picture = Image.fromarray(RNG.integers(0, 255, (8, 9)).astype(np.uint8))
    for name in ("a.png", "a.jpg", "a.tif"):
        picture.save(tmp_path / name, dpi=(254, 254))
        scan = scans.read_scan(tmp_path / name)
        assert np.isnan(scan.spacing).all()
        assert scan.affine is None
