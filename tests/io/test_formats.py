"""A file is what its bytes say: read under another name, or named with the remedy."""

import gzip
import io
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk

from medsam_jax.errors import UserError
from medsam_jax.io import formats, scans

ARRAY = np.arange(192, dtype=np.int16).reshape(4, 6, 8)


def content(suffix, folder):
    """Bytes of ARRAY as ITK writes them."""
    path = folder / f"written{suffix}"
    image = sitk.GetImageFromArray(ARRAY)
    image.SetSpacing((0.5, 0.75, 3.0))
    sitk.WriteImage(image, str(path))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "name", "note"),
    [
        (".nii", "a.nii.gz", "is not compressed, although its name ends in .gz"),
        (".nrrd", "a.nii.gz", "is a NRRD, although it is named a.nii.gz"),
        (".nrrd", "a.png", "is a NRRD, although it is named a.png"),
        (".mha", "a.nrrd", "is a MetaImage, although it is named a.nrrd"),
        (".nii", "a.NII", ""),
        (".mha", "a", ""),
    ],
)
def test_a_scan_under_another_name_is_read(tmp_path, suffix, name, note):
    (tmp_path / name).write_bytes(content(suffix, tmp_path))
    scan = scans.read_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.array, ARRAY)
    assert scan.spacing == (3.0, 0.75, 0.5)
    assert note in "".join(scan.notes)
    assert len(scan.notes) == bool(note)


def hdf5(folder):
    return b"\x89HDF\r\n\x1a\n" + bytes(600)


def npy(folder):
    stream = io.BytesIO()
    np.save(stream, ARRAY)
    return stream.getvalue()


def archive(folder):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("scan.nii", content(".nii", folder))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: gzip.compress(content(".nii", folder)), "gzip-compressed.*rename it to"),
        (lambda _: b"<!DOCTYPE html><title>Sign in</title>", "is a web page; download"),
        (lambda _: b"\n <html><body>404</body></html>", "is a web page; download"),
        (lambda _: b'{"error": "not found"}', "is a JSON text"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "git lfs pull"),
        (lambda _: gzip.compress(b"<html></html>"), "gzip-compressed web page; download"),
        (lambda folder: gzip.compress(content(".nrrd", folder)), "gzip-compressed NRRD; unpack"),
        (lambda _: b"\x28\xb5\x2f\xfd" + bytes(99), "is a zstd archive; unpack"),
        (lambda _: b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive; unpack"),
        (lambda _: b"BZh91AY" + bytes(99), "is a bzip2 archive; unpack"),
        (hdf5, "is a HDF5; save its image"),
        (lambda _: b"MATLAB 5.0 MAT-file, Platform" + bytes(99), "is a MATLAB file; save"),
        (npy, "is a NumPy array; save it as .npz"),
        (archive, "unpack it"),
        (lambda _: gzip.compress(b"\0\0\0\1" + bytes(400)), "FreeSurfer volume; convert it"),
        (lambda _: b"\0\0\0\x20ftypheic" + bytes(99), "is a HEIF picture or video; save it"),
        (lambda _: b"\x1f\x8b" + bytes(99), "damaged gzip"),
        (lambda _: b"\1\2\3\4" * 99, "first bytes are of no known format"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.mha"])
def test_other_files_are_named_with_the_remedy(tmp_path, make, message, name, capfd):
    path = tmp_path / name
    path.write_bytes(make(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        scans.read_scan(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not capfd.readouterr().err


def test_nifti_2_is_named(tmp_path):
    header = (540).to_bytes(4, "little") + b"n+2\0\r\n\x1a\n" + bytes(600)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header))
    (tmp_path / "b.nii").write_bytes(header)
    with pytest.raises(UserError, match="is a gzip-compressed NIfTI-2 file; save it as NIfTI-1"):
        scans.read_scan(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match="is a NIfTI-2 file; save it as NIfTI-1"):
        scans.read_scan(tmp_path / "b.nii")


@pytest.mark.parametrize("number", range(len(formats._MAGIC)))
def test_every_row_of_the_table_is_reached(tmp_path, number):
    offset, magic, name = formats._MAGIC[number]
    (tmp_path / "a").write_bytes(b"\x77" * offset + magic + b"\x77" * 400)
    if name == "gzip":
        with pytest.raises(UserError, match="damaged gzip"):
            formats.identify(tmp_path / "a")
    else:
        assert formats.identify(tmp_path / "a").name == name
