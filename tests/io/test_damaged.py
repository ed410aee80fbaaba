"""Damage that once led to a hang, a traceback, too much memory or a line beside the error."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from medsam_jax.errors import UserError
from medsam_jax.io import scans
from tests.io.dicom_files import MR, write_slice
from tests.io.mutations import mend_png, volume


def meta(path, old=b"", new=b""):
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(path), useCompression=True)
    content = path.read_bytes()
    changed = re.sub(old, new, content, count=1)
    assert changed != content or not old
    path.write_bytes(changed)
    return path


def far_away(folder):
    """VNL's decomposition of such a matrix does not end."""
    return meta(
        folder / "a.mha",
        rb"TransformMatrix = 1 0 0 0 1 0 0 0 1",
        b"TransformMatrix = 1 0 0 0 1 0 0 1e308 1",
    )


def wide(folder):
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(folder / "a.nrrd"))
    content = (folder / "a.nrrd").read_bytes()
    assert b"(1,0,0)" in content
    (folder / "a.nrrd").write_bytes(content.replace(b"(1,0,0)", b"(1e308,1e308,0)"))
    return folder / "a.nrrd"


def not_a_type(folder):
    return meta(folder / "a.mha", rb"MET_SHORT", b"\x00\xffMET")


def dimensions(folder, old=b"3", new=b"-1"):
    """MetaIO writes beyond an array."""
    return meta(folder / "a.mha", b"NDims = " + old, b"NDims = " + new)


def a_field_twice(folder):
    return meta(folder / "a.mha", b"BinaryData = True", b"DimSize = 5 5 5\nBinaryData = True")


def jpeg_2000(folder):
    """ITK goes by the name, and OpenJPEG crashes."""
    Image.fromarray(volume()[0].astype(np.uint8)).save(folder / "a.jp2")
    content = bytearray((folder / "a.jp2").read_bytes())
    content[0] = 0x99
    (folder / "a.jp2").write_bytes(content)
    return folder / "a.jp2"


def webp(folder):
    Image.fromarray(volume()[0].astype(np.uint8)).save(folder / "a.webp")
    content = bytearray((folder / "a.webp").read_bytes())
    assert content[12:16] == b"VP8 "
    content[26:30] = b"\xff\x3f\xff\x3f"
    (folder / "a.webp").write_bytes(content)
    return folder / "a.webp"


def circle(folder):
    """The second page of a TIFF names the first one as the next."""
    with tifffile.TiffWriter(folder / "a.tif") as writer:
        for page in volume("uint16")[:2]:
            writer.write(page, metadata=None)
    with tifffile.TiffFile(folder / "a.tif") as file:
        first, second = (page.offset for page in file.pages)
    content = bytearray((folder / "a.tif").read_bytes())
    count = struct.unpack_from("<H", content, second)[0]
    struct.pack_into("<I", content, second + 2 + 12 * count, first)
    (folder / "a.tif").write_bytes(content)
    return folder / "a.tif"


def lost_pages(folder):
    with tifffile.TiffWriter(folder / "a.tif") as writer:
        for page in volume("uint16")[:2]:
            writer.write(page, metadata=None)
    content = (folder / "a.tif").read_bytes()
    (folder / "a.tif").write_bytes(content[:200])
    return folder / "a.tif"


def npz(folder, content):
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("imgs.npy", content)
    return folder / "a.npz"


def npz_of_millions(folder):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<i2", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    return npz(folder, buffer.getvalue() + bytes(100))


def cut_png(folder):
    Image.fromarray(volume()[0].astype(np.uint8)).save(folder / "a.png")
    content = bytearray((folder / "a.png").read_bytes())
    content[24] = 77  # bits a sample
    (folder / "a.png").write_bytes(mend_png(bytes(content)))
    return folder / "a.png"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (far_away, "transformmatrix in the header has 1e308; write the file again"),
        (wide, "space directions in the header has 1e308; write the file again"),
        (not_a_type, r"type \\x00"),
        (dimensions, "NDims is -1, DimSize 20 16 4"),
        (lambda folder: dimensions(folder, new=b"99999999999"), "NDims is 99999999999"),
        (a_field_twice, "its header has dimsize twice"),
        (jpeg_2000, "its beginning is damaged"),
        (webp, "says 16383 x 16383 pixels in"),
        (circle, "its pages lead in a circle"),
        (lost_pages, "a.tif: "),
        (lambda folder: npz(folder, b"no array"), "a.npz: "),
        (npz_of_millions, "truncated: 2000000000000 bytes"),
        (cut_png, "a.png: "),
    ],
)
def test_one_line_and_nothing_beside_it(tmp_path, make, message, capfd):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        scans.read_scan(path)
    assert str(error.value).isprintable()
    assert str(path) in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_class_of_dicom_warns_of_nothing(tmp_path, capfd):
    write_slice(tmp_path / "a.dcm", volume()[0])
    content = (tmp_path / "a.dcm").read_bytes()
    assert content.count(MR.encode()) == 2
    (tmp_path / "a.dcm").write_bytes(content.replace(MR.encode(), b"x" + MR.encode()[1:]))
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.dcm").array[0], volume()[0])
    assert capfd.readouterr() == ("", "")


def test_a_colour_tiff_of_bits(tmp_path):
    array = np.random.default_rng(0).integers(0, 2, (8, 16, 3)).astype(bool)
    packed = np.packbits(array.reshape(8, -1), axis=1)
    tags = [(256, 16), (257, 8), (259, 1), (262, 2), (277, 3), (278, 8), (279, packed.nbytes)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags[:2])
    start = 8 + 2 + 12 * 9 + 4
    entries += struct.pack("<HHII", 258, 3, 3, start)
    for tag, value in [*tags[2:4], (273, start + 8), *tags[4:]]:
        entries += struct.pack("<HHII", tag, 4, 1, value)
    head = struct.pack("<2sHIH", b"II", 42, 8, 9) + entries + bytes(4)
    content = head + struct.pack("<4H", 1, 1, 1, 0) + packed.tobytes()
    (tmp_path / "a.tif").write_bytes(content)
    found = scans.read_scan(tmp_path / "a.tif").array
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], array * 255)


def test_a_mask_with_signalling_nan(tmp_path):
    labels = np.zeros((4, 16, 20), np.float32)
    labels.view(np.uint32)[0, 0, 0] = 0x7FA00000
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / "m.nrrd"))
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(tmp_path / "i.nrrd"))
    scan = scans.read_scan(tmp_path / "i.nrrd")
    with pytest.raises(UserError, match="1 voxels are no whole labels"):
        scans.read_mask(tmp_path / "m.nrrd", scan)
