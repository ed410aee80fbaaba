"""Masks: lost geometry, share outside the image, smeared edges; honest label maps pass."""

import io

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image, ImageDraw, ImageFilter

from medsam_jax.errors import UserError
from medsam_jax.io import scans

SPACING, ORIGIN = (0.8, 0.75, 3.0), (40.0, 30.0, 20.0)
TURNED = (1, 0, 0, 0, 0.8, -0.6, 0, 0.6, 0.8)
FLIPPED = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
SIDE = (1, 0, 0, 0, 1, 0, 0, 0, 1)


def ball(shape=(12, 40, 48)):
    grid = np.indices(shape) - np.array([6, 16, 28]).reshape(3, 1, 1, 1)
    return (np.sum((grid / np.array([4, 9, 11]).reshape(3, 1, 1, 1)) ** 2, 0) <= 1).astype(np.uint8)


def write(path, array, spacing=SPACING, origin=ORIGIN, direction=SIDE):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return path


def image(folder, direction=SIDE, suffix=".nrrd"):
    array = np.random.default_rng(0).normal(0, 1, (12, 40, 48)).astype(np.float32)
    return scans.read_scan(write(folder / f"image{suffix}", array, direction=direction))


@pytest.mark.parametrize(
    ("direction", "lost", "named"),
    [
        (SIDE, {"origin": (0, 0, 0)}, "its origin"),
        (FLIPPED, {"origin": (0, 0, 0)}, "its origin"),
        (TURNED, {"origin": (0, 0, 0)}, "its origin"),
        (SIDE, {"spacing": (1, 1, 1)}, "its spacing"),
        (SIDE, {"spacing": (1, 1, 1), "origin": (0, 0, 0)}, "its origin and spacing"),
        (TURNED, {"direction": SIDE}, "its direction"),
        (FLIPPED, {"direction": SIDE}, "its direction"),
        (SIDE, {"direction": FLIPPED, "origin": (-40, -30, 20)}, "its sign of x and y"),
    ],
)
def test_a_mask_that_lost_its_geometry_is_refused(tmp_path, direction, lost, named):
    scan = image(tmp_path, direction)
    mask = write(tmp_path / "mask.nrrd", ball(), **({"direction": direction} | lost))
    with pytest.raises(UserError, match=f"{named} .mask origin.*copy the image's geometry"):
        scans.read_mask(mask, scan)


def test_an_image_that_lost_its_geometry_is_refused(tmp_path):
    array = np.random.default_rng(0).normal(0, 1, (12, 40, 48)).astype(np.float32)
    scan = scans.read_scan(write(tmp_path / "i.nrrd", array, origin=(0, 0, 0)))
    mask = write(tmp_path / "m.nrrd", ball())
    with pytest.raises(UserError, match="which has not its origin .*copy the mask's geometry"):
        scans.read_mask(mask, scan)


@pytest.mark.parametrize("codes", ["none", "eye"])
def test_a_nifti_mask_without_position_is_refused(tmp_path, codes):
    import struct

    scan = image(tmp_path, FLIPPED, ".nii")
    path = write(tmp_path / "mask.nii", ball(), direction=FLIPPED)
    content = bytearray(path.read_bytes())
    if codes == "none":
        struct.pack_into("<hh", content, 252, 0, 0)
    else:
        struct.pack_into("<hh", content, 252, 0, 1)
        struct.pack_into("<3f", content, 80, 1, 1, 1)
        struct.pack_into("<12f", content, 280, *np.eye(3, 4).ravel())
    path.write_bytes(content)
    with pytest.raises(UserError, match="has the size of the image .* but not its origin"):
        scans.read_mask(path, scan)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flipped_mask_with_its_origin_at_zero_is_right(tmp_path, axis):
    """The image's origin is at the far end of a flipped axis: the same places."""
    labels = ball()
    direction, origin = np.eye(3), np.zeros(3)
    direction[2 - axis, 2 - axis] = -1
    origin[2 - axis] = (labels.shape[axis] - 1) * SPACING[2 - axis]
    array = np.random.default_rng(0).normal(0, 1, labels.shape).astype(np.float32)
    path = write(tmp_path / "i.nrrd", array, origin=origin, direction=direction.ravel().tolist())
    mask = write(tmp_path / "m.nrrd", np.flip(labels, axis).copy(), origin=(0, 0, 0))
    found = scans.read_mask_scan(mask, scans.read_scan(path))
    np.testing.assert_array_equal(found.array, labels)
    assert found.notes == ("The mask is on another grid; it was resampled by nearest neighbour.",)


@pytest.mark.parametrize(
    ("cut", "message"),
    [(0, "resampled by nearest neighbour."), (20, "of it lies outside the image."), (28, None)],
)
def test_share_outside_the_image(tmp_path, cut, message):
    """The image is a part of the mask's grid, from column `cut` on."""
    labels = ball()
    outside = np.count_nonzero(labels[:, :, :cut]) / np.count_nonzero(labels)
    origin = (ORIGIN[0] + cut * SPACING[0], *ORIGIN[1:])
    array = np.random.default_rng(0).normal(0, 1, (12, 40, 47 - cut)).astype(np.float32)
    scan = scans.read_scan(write(tmp_path / "i.nrrd", array, origin=origin))
    mask = write(tmp_path / "m.nrrd", labels)
    if message is None:
        with pytest.raises(UserError, match=f"{outside:.0%} of the mask lies outside the image"):
            scans.read_mask(mask, scan)
        return
    found = scans.read_mask_scan(mask, scan)
    np.testing.assert_array_equal(found.array, labels[:, :, cut:47])
    assert found.notes[0].endswith(message)
    assert (f"{outside:.2%}" in found.notes[0]) == (cut > 0)


# --- smeared edges


def drawing(labels=(255,), size=(400, 500)):
    picture = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(picture)
    for number, label in enumerate(labels):
        x, y = 60 + 110 * (number % 4), 60 + 120 * (number // 4)
        draw.ellipse((x, y, x + 100, y + 100), fill=label)
    return picture


def jpeg(picture):
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=75)
    return Image.open(stream)


def resized(factor, method):
    def resize(picture):
        small = tuple(int(side * factor) for side in picture.size)
        return picture.resize(small, method).resize(picture.size, method)

    return resize


SMEARS = {
    "jpeg": jpeg,
    "bilinear": resized(0.5, Image.BILINEAR),
    "cubic": resized(0.5, Image.BICUBIC),
    "down": lambda picture: picture.resize((250, 200), Image.BILINEAR),
    "up": lambda picture: picture.resize((750, 600), Image.BILINEAR),
    "turned": lambda picture: picture.rotate(17, Image.BILINEAR),
}


@pytest.mark.parametrize("smear", list(SMEARS))
@pytest.mark.parametrize("labels", [(255,), (128,), (85, 170, 255)])
@pytest.mark.parametrize("as_colours", [False, True])
def test_smeared_edges_are_refused(tmp_path, smear, labels, as_colours):
    picture = SMEARS[smear](drawing(labels))
    (picture.convert("RGB") if as_colours else picture).save(tmp_path / "m.png")
    scan = scans.read_scan(tmp_path / "m.png")
    with pytest.raises(UserError, match="edges are smeared .values .*threshold it"):
        scans.read_mask(tmp_path / "m.png", scan)


def thin_wall():
    """Label 1 is a wall of one pixel around 2."""
    picture = Image.new("L", (200, 200))
    ImageDraw.Draw(picture).ellipse((40, 40, 160, 160), fill=2, outline=1)
    return picture


def instances():
    """80 nuclei of 6 pixels across with ids that are not consecutive."""
    picture = Image.new("I", (400, 400))
    draw = ImageDraw.Draw(picture)
    for number in range(80):
        x, y = 20 + 40 * (number % 9), 20 + 40 * (number // 9)
        draw.ellipse((x, y, x + 6, y + 6), fill=1000 + 37 * number)
    return Image.fromarray(np.asarray(picture).astype(np.uint16))


def specks():
    """Two organs, and vessels of 1 to 4 pixels beside them with ids in between."""
    picture = drawing((200, 90))
    draw = ImageDraw.Draw(picture)
    for number in range(30):
        draw.point((20 + 9 * number, 200), fill=100 + number)
        draw.rectangle((59, 80 + number, 60, 81 + number), fill=120)
    return picture


def test_one_value_on_all_edges_is_refused(tmp_path):
    half = np.asarray(drawing().resize((250, 200), Image.BILINEAR))
    labels = np.where(half == 0, 0, np.where(half == 255, 255, 128)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "m.png")
    scan = scans.read_scan(tmp_path / "m.png")
    with pytest.raises(UserError, match="smeared .values 128, 255 side by side"):
        scans.read_mask(tmp_path / "m.png", scan)


def test_smeared_edges_of_all_values_are_refused(tmp_path):
    """All values from 0 on are there, as in a label map that counts them."""
    rng = np.random.default_rng(0)
    wide = Image.new("L", (1200, 1200))
    for x, y in np.argwhere(np.ones((11, 11))) * 105 + 20:
        radius = rng.integers(30, 80)
        ImageDraw.Draw(wide).ellipse((x, y, x + radius, y + rng.integers(30, 80)), fill=255)
    smooth = np.asarray(wide.filter(ImageFilter.GaussianBlur(2)))
    ranks = np.unique(smooth, return_inverse=True)[1].reshape(smooth.shape).astype(np.uint8)
    assert ranks.max() > 200
    Image.fromarray(ranks).save(tmp_path / "m.png")
    scan = scans.read_scan(tmp_path / "m.png")
    with pytest.raises(UserError, match="edges are smeared"):
        scans.read_mask(tmp_path / "m.png", scan)


@pytest.mark.parametrize(
    "picture",
    [
        drawing((255,)),
        drawing((1, 2, 3, 4, 5)),
        drawing((85, 170, 255)),
        drawing((50, 100, 150, 200, 250, 33, 77)),
        thin_wall(),
        instances(),
        specks(),
    ],
)
def test_honest_label_maps_are_read(tmp_path, picture):
    picture.save(tmp_path / "m.png")
    scan = scans.read_scan(tmp_path / "m.png")
    labels = scans.read_mask(tmp_path / "m.png", scan)
    np.testing.assert_array_equal(labels[0], np.asarray(picture))


def test_a_smeared_volume_is_refused(tmp_path):
    scan = image(tmp_path)
    smooth = sitk.GetArrayFromImage(
        sitk.DiscreteGaussian(sitk.GetImageFromArray(ball().astype(np.float32) * 255), 1.0)
    )
    mask = write(tmp_path / "m.nrrd", np.round(smooth).astype(np.uint8))
    with pytest.raises(UserError, match="edges are smeared"):
        scans.read_mask(mask, scan)
