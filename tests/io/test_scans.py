"""Reading: every format back to the array that was written, in the right order and orientation."""

import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medsam_jax.errors import UserError
from medsam_jax.io import geometry, scans


def volume(shape=(4, 6, 8), dtype=np.int16):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def write(
    path, array, spacing=(0.5, 0.7, 3.0), origin=(1.0, -2.0, 5.0), direction=None, compress=False
):
    """Writes [Z, Y, X] with spacing and origin in (x, y, z) order."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


def write_series(folder, array, uid, spacing=(0.5, 0.7, 3.0), skip=()):
    """A minimal DICOM series: one file a slice."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index, plane in enumerate(array):
        if index in skip:
            continue
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing(spacing[:2])
        tags = {
            "0008|0060": "CT",
            "0020|000e": uid,
            "0020|000d": "1.2.3",
            "0008|0018": f"{uid}.{index + 1}",
            "0020|0032": f"0\\0\\{index * spacing[2]}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(index),
            "0018|0050": str(spacing[2]),
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}-{index}.dcm"))
        writer.Execute(image)
    return folder


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.mhd"])
def test_medical_formats(tmp_path, name):
    array = volume()
    scan = scans.read_scan(write(tmp_path / name, array))
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.spacing, (3.0, 0.7, 0.5))
    again = scan.to_image(array)
    np.testing.assert_allclose(again.GetOrigin(), (1.0, -2.0, 5.0))
    np.testing.assert_allclose(again.GetSpacing(), (0.5, 0.7, 3.0), rtol=1e-6)


def test_dicom_series(tmp_path):
    array = volume()
    scan = scans.read_scan(write_series(tmp_path / "series", array, "1.2.3.4"))
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.spacing, (3.0, 0.7, 0.5))


def test_one_of_several_series_is_chosen_by_name(tmp_path):
    write_series(tmp_path / "both", volume(), "1.2.3.4")
    folder = write_series(tmp_path / "both", volume((3, 6, 8)) + 5, "1.2.3.5")
    with pytest.raises(
        UserError, match=r"2 DICOM series.*1\.2\.3\.4 \(4 files\).*FOLDER#SERIES_UID"
    ):
        scans.read_scan(folder)
    assert scans.read_scan(f"{folder}#1.2.3.5").array.shape == (3, 6, 8)
    with pytest.raises(UserError, match="no series '9'"):
        scans.read_scan(f"{folder}#9")


def test_a_series_with_a_missing_slice_is_refused(tmp_path, capfd):
    folder = write_series(tmp_path / "gap", volume((6, 6, 8)), "1.2.3.4", skip=(2,))
    with pytest.raises(UserError, match=r"not evenly spaced \(3.00 to 6.00 mm"):
        scans.read_scan(folder)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("mode", "shape", "expected"),
    [
        ("L", (5, 7), (1, 5, 7)),
        ("RGB", (5, 7, 3), (1, 5, 7, 3)),
        ("RGBA", (5, 7, 4), (1, 5, 7, 3)),
        ("LA", (5, 7, 2), (1, 5, 7)),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures(tmp_path, mode, shape, expected, suffix):
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    Image.fromarray(array, mode=None).save(tmp_path / f"a{suffix}")
    scan = scans.read_scan(tmp_path / f"a{suffix}")
    assert scan.array.shape == expected
    kept = array[..., :3] if len(expected) == 4 else array.reshape(5, 7, -1)[..., 0]
    np.testing.assert_array_equal(scan.array[0], kept)
    assert np.isnan(scan.spacing).all()
    assert scan.affine is None


def test_16_bit_grey_keeps_its_bits(tmp_path):
    array = (np.arange(35).reshape(5, 7) * 1000).astype(np.uint16)
    Image.fromarray(array).save(tmp_path / "a.png")
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.png").array[0], array)


def test_16_bit_colour_tiff(tmp_path):
    array = (np.arange(105).reshape(5, 7, 3) * 600).astype(np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / "a.tif"))
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.tif").array[0], array)


def test_palette_is_colours_in_an_image_and_labels_in_a_mask(tmp_path):
    indices = np.random.default_rng(0).integers(0, 3, (5, 7)).astype(np.uint8)
    picture = Image.fromarray(indices, mode=None).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.putdata(indices.ravel().tolist())
    picture.save(tmp_path / "a.png")
    scan = scans.read_scan(tmp_path / "a.png")
    np.testing.assert_array_equal(scan.array[0, :, :, 0], np.where(indices == 1, 255, 0))
    np.testing.assert_array_equal(scans.read_mask(tmp_path / "a.png", scan)[0], indices)


def test_exif_rotation_is_applied(tmp_path):
    array = np.zeros((4, 8, 3), np.uint8)
    array[:, :4] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    Image.fromarray(array).save(tmp_path / "a.jpg", exif=exif, quality=100)
    scan = scans.read_scan(tmp_path / "a.jpg")
    assert scan.array.shape == (1, 8, 4)  # grey stored as equal colours is one channel
    assert scan.array[0, :4].mean() > 190
    assert scan.array[0, 4:].mean() < 10


def test_multi_page_tiff_is_a_volume(tmp_path):
    array = volume((3, 5, 7), np.uint8)
    pages = [Image.fromarray(page) for page in array]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(scans.read_scan(tmp_path / "a.tif").array, array)


def test_medsam_npz(tmp_path):
    imgs, gts = volume((3, 5, 7), np.uint8), (volume((3, 5, 7)) % 3).astype(np.uint8)
    np.savez(tmp_path / "a.npz", imgs=imgs, gts=gts, spacing=(0.5, 0.7, 3.0))
    scan = scans.read_scan(tmp_path / "a.npz")
    np.testing.assert_array_equal(scan.array, imgs)
    assert scan.spacing == (3.0, 0.7, 0.5)
    np.testing.assert_array_equal(scans.read_mask(tmp_path / "a.npz", scan), gts)


def test_npz_picture(tmp_path):
    imgs = volume((5, 7, 3), np.uint8)
    np.savez(tmp_path / "a.npz", imgs=imgs, gts=imgs[..., 0] % 2)
    scan = scans.read_scan(tmp_path / "a.npz")
    assert scan.array.shape == (1, 5, 7, 3)
    assert scans.read_mask(tmp_path / "a.npz", scan).shape == (1, 5, 7)


# --- masks in physical space


def test_a_mask_stored_flipped_comes_out_right(tmp_path):
    image = volume()
    labels = np.zeros(image.shape, np.uint8)
    labels[1, :2, :3] = 7
    scan = scans.read_scan(write(tmp_path / "i.nii.gz", image, origin=(0, 0, 0)))
    flipped = write(
        tmp_path / "m.nii.gz",
        labels[:, ::-1].copy(),
        origin=(0, 0.7 * 5, 0),
        direction=(1, 0, 0, 0, -1, 0, 0, 0, 1),
    )
    np.testing.assert_array_equal(scans.read_mask(flipped, scan), labels)


def test_a_coarser_and_cropped_mask_is_resampled_nearest(tmp_path):
    scan = scans.read_scan(write(tmp_path / "i.nrrd", volume((4, 8, 8)), (1, 1, 1), (0, 0, 0)))
    labels = np.zeros((4, 2, 4), np.uint8)
    labels[:, 0, :2], labels[:, 1, 3] = 300 % 256, 9
    mask = write(tmp_path / "m.nrrd", labels, (2, 2, 1), (0.5, 0.5, 0))
    expected = np.zeros((4, 8, 8), np.int32)
    expected[:, :4] = labels.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(scans.read_mask(mask, scan), expected)


def test_rounded_geometry_counts_as_the_same_grid(tmp_path):
    labels = (volume() % 2).astype(np.uint8)
    scan = scans.read_scan(write(tmp_path / "i.nrrd", volume(), origin=(1.0, -2.0, 5.0)))
    mask = write(tmp_path / "m.nrrd", labels, origin=(1.001, -2.0, 5.001))
    np.testing.assert_array_equal(scans.read_mask(mask, scan), labels)


def test_labels_above_a_byte_survive(tmp_path):
    labels = np.where(volume() > 100, 70000, 0).astype(np.int32)
    scan = scans.read_scan(write(tmp_path / "i.nrrd", volume()))
    found = scans.read_mask(write(tmp_path / "m.nrrd", labels), scan)
    assert np.unique(found).tolist() == [0, 70000]


# --- slice axis

AXES = np.eye(3)


@pytest.mark.parametrize(
    ("spacing", "direction", "axis"),
    [
        ((0.5, 0.5, 3.0), AXES, 0),
        ((3.0, 0.5, 0.5), AXES, 2),  # sagittal acquisition: thick along x
        ((0.5, 3.0, 0.5), AXES, 1),
        ((1.0, 1.0, 1.0), AXES, 0),  # isotropic: feet to head
        ((1.0, 1.0, 1.0), AXES[:, [1, 2, 0]], 1),  # z of the patient is the y index
        ((1.0, 1.0, 1.0), AXES[:, [2, 0, 1]], 2),
    ],
)
def test_slices_are_cut_out_of_plane(tmp_path, spacing, direction, axis):
    path = write(tmp_path / "a.nrrd", volume(), spacing, direction=direction.ravel().tolist())
    assert geometry.slice_axis(scans.read_scan(path)) == axis


def test_a_single_slice_has_its_axis(tmp_path):
    path = write(tmp_path / "a.nrrd", volume((6, 1, 8)), (1.0, 1.0, 1.0))
    assert geometry.slice_axis(scans.read_scan(path)) == 1


# --- bad input: one line that names the file, what was found and the remedy


def truncated(tmp_path, name, compress=False):
    array = np.random.default_rng(0).integers(0, 999, (8, 32, 32))
    path = write(tmp_path / name, array, compress=compress)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def four_dimensions(tmp_path):
    frames = [sitk.GetImageFromArray(volume()) for _ in range(2)]
    sitk.WriteImage(sitk.JoinSeries(frames), str(tmp_path / "a.nii.gz"))
    return tmp_path / "a.nii.gz"


def without_spacing(tmp_path):
    """ITK takes 1 mm where a header says 0."""
    path = write(tmp_path / "a.nii", volume(), spacing=(0.75, 0.5, 3.0))
    header = bytearray(path.read_bytes())
    assert struct.unpack_from("<3f", header, 80) == (0.75, 0.5, 3.0)
    struct.pack_into("<f", header, 84, 0.0)
    path.write_bytes(header)
    return path


def not_finite(tmp_path):
    array = volume(dtype=np.float32)
    array[0, 0, :2] = np.nan, np.inf
    return write(tmp_path / "a.nrrd", array)


def file_with(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "no.nii.gz", "does not exist; correct the path$"),
        (lambda path: file_with(path, "a.nrrd", b""), "0 bytes"),
        (lambda path: file_with(path, "a.nii.gz", b"GIF89a not a scan"), "cannot be read"),
        (lambda path: file_with(path, "a.png", b"\x89PNG no"), "not a picture"),
        (lambda path: file_with(path, "a.npz", b"PK no"), r"\.npz"),
        (lambda path: truncated(path, "a.nii.gz"), "cannot be read"),
        (lambda path: truncated(path, "a.nii"), "cannot be read"),
        (lambda path: truncated(path, "a.nrrd"), "cannot be read"),
        (lambda path: truncated(path, "a.nrrd", compress=True), "cannot be read"),
        (lambda path: truncated(path, "a.mha", compress=True), "cannot be read"),
        (lambda path: truncated(path, "a.mha"), "cannot be read"),
        (four_dimensions, r"4 dimensions \(8 x 6 x 4 x 2\)"),
        (without_spacing, r"header says 0.75 x 0 x 3 mm a voxel; write the scan's spacing"),
        (not_finite, "2 voxels are NaN or infinite"),
        (empty_folder, "no DICOM series"),
    ],
)
def test_bad_images(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        scans.read_scan(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_gzip_in_several_members_is_no_truncation(tmp_path):
    array = volume((8, 32, 32))
    content = write(tmp_path / "a.nii", array).read_bytes()
    members = gzip.compress(content[:9000]) + gzip.compress(content[9000:])
    scan = scans.read_scan(file_with(tmp_path, "b.nii.gz", members))
    np.testing.assert_array_equal(scan.array, array)


def test_truncated_pictures(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.tif"):
        Image.fromarray(array).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(UserError, match=f"{name}: .*export it again"):
            scans.read_scan(tmp_path / name)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 6, 8), np.uint8), "mask is empty"),
        (volume() - 3, "negative label"),
        (volume(dtype=np.float32) / 4, "no whole labels.*0.25"),
        (np.full((4, 6, 8), np.nan, np.float32), "no whole labels"),
    ],
)
def test_bad_masks(tmp_path, labels, message):
    scan = scans.read_scan(write(tmp_path / "i.nrrd", volume()))
    with pytest.raises(UserError, match=message):
        scans.read_mask(write(tmp_path / "m.nrrd", labels), scan)


def test_a_mask_elsewhere_is_refused(tmp_path):
    scan = scans.read_scan(write(tmp_path / "i.nrrd", volume()))
    mask = write(tmp_path / "m.nrrd", np.ones((4, 6, 8), np.uint8), origin=(500, 0, 0))
    with pytest.raises(UserError, match="does not overlap the image"):
        scans.read_mask(mask, scan)


def test_a_picture_mask_of_another_size_is_refused(tmp_path):
    Image.fromarray(volume((5, 7), np.uint8)).save(tmp_path / "i.png")
    Image.fromarray(volume((5, 8), np.uint8)).save(tmp_path / "m.png")
    scan = scans.read_scan(tmp_path / "i.png")
    with pytest.raises(UserError, match="8 x 5 x 1 for an image of 7 x 5 x 1"):
        scans.read_mask(tmp_path / "m.png", scan)


def test_a_jpeg_mask_is_refused_once_it_is_smeared(tmp_path):
    labels = np.zeros((32, 32), np.uint8)
    labels[5:19, 7:22] = 255
    Image.fromarray(labels).save(tmp_path / "m.jpg", quality=60)
    scan = scans.read_scan(tmp_path / "m.jpg")
    with pytest.raises(UserError, match="JPEG has smeared.*save masks as PNG"):
        scans.read_mask(tmp_path / "m.jpg", scan)


def test_a_colour_mask_is_refused(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "m.png")
    scan = scans.read_scan(tmp_path / "m.png")
    with pytest.raises(UserError, match="has colours"):
        scans.read_mask(tmp_path / "m.png", scan)
