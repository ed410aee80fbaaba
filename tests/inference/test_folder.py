"""Folder runs: what is found, skipped, done again, and how one bad file is reported."""

import json

import numpy as np
import pytest
from PIL import Image

from medsam_jax.errors import OutputError, UserError
from medsam_jax.inference import predict_file
from medsam_jax.inference.predict_file import FilePredictor, Request
from medsam_jax.inference.predict_folder import find_images, predict_path
from tests.io.test_scans import write_series

BOXES = [[3, 3, 18, 12]]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(("a.png", "b.png", "c.jpg", "c.png")):
        array = np.zeros((16, 24), np.uint8)
        array[5:10, 5 : 10 + number] = 255
        Image.fromarray(array).save(images / name)
    (images / "notes.txt").write_text("no image")
    return images


def request(folder, **changes) -> Request:
    settings = {"image": str(folder), "output": folder.parent / "out", "boxes": BOXES}
    return Request("m", **(settings | changes))


@pytest.fixture
def ran(bright, monkeypatch):
    """Names of the images that are predicted, as they are."""
    names = []
    run = FilePredictor.run

    def spy(self, image, name, mask=None):
        names.append(name)
        return run(self, image, name, mask)

    monkeypatch.setattr(FilePredictor, "run", spy)
    return names


def test_all_images_and_one_coco_file(ran, folder, capsys):
    predict_path(request(folder))
    assert ran == ["a", "b", "c.jpg", "c.png"]  # equal stems keep their suffixes
    assert "4 images done, 0 skipped (finished earlier), 0 failed" in capsys.readouterr().out
    coco = json.loads((folder.parent / "out" / "coco.json").read_text())
    assert [i["file_name"] for i in coco["images"]] == ["a.png", "b.png", "c.jpg", "c.png"]
    assert [a["area"] for a in coco["annotations"]][:2] == [25, 30]
    assert coco["categories"] == [{"id": 1, "name": "object"}]


def test_a_picture_called_coco_keeps_its_record(ran, folder):
    """Alone, in a folder, and beside one that has the name it gets instead."""
    (folder / "a.png").rename(folder / "Coco.png")
    output = folder.parent / "out"
    predict_path(request(folder, image=str(folder / "Coco.png")))
    predict_path(request(folder))
    assert ran == ["Coco_image", "b", "c.jpg", "c.png"]  # the first is not done again
    assert json.loads((output / "Coco_image.json").read_text())["objects"]
    assert len(json.loads((output / "coco.json").read_text())["images"]) == 4
    (folder / "b.png").rename(folder / "coco_image.png")
    predict_path(request(folder))
    assert ran[4:] == ["Coco.png", "coco_image.png"]


def test_goes_on_where_it_stopped(ran, folder, monkeypatch, capsys):
    """Interrupted within the third image: it leaves nothing, the first two are not done again."""
    write_json = predict_file.write_json

    def interrupted(path, content):
        if path.name == "c.jpg.json":
            raise KeyboardInterrupt
        write_json(path, content)

    monkeypatch.setattr(predict_file, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_path(request(folder))
    output = folder.parent / "out"
    assert not list(output.glob(".partial*"))
    monkeypatch.setattr(predict_file, "write_json", write_json)
    ran.clear()
    predict_path(request(folder))
    assert ran == ["c.jpg", "c.png"]
    assert "2 images done, 2 skipped (finished earlier), 0 failed" in capsys.readouterr().out
    (output / "a_overlay.png").unlink()  # an output that has gone is made again
    ran.clear()
    predict_path(request(folder))
    assert ran == ["a"]


def test_other_settings_or_images_are_done_again(ran, folder):
    predict_path(request(folder))
    ran.clear()
    Image.fromarray(np.full((16, 24), 255, np.uint8)).save(folder / "b.png")
    predict_path(request(folder))
    assert ran == ["b"]
    ran.clear()
    predict_path(request(folder, boxes=[[0, 0, 9, 9]]))
    assert ran == ["a", "b", "c.jpg", "c.png"]


def test_one_bad_file_does_not_stop_the_others(ran, folder, capsys):
    (folder / "b.png").write_bytes(b"")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / "d.png")  # the box misses it
    with pytest.raises(UserError, match="2 of 5 images failed"):
        predict_path(request(folder))
    shown = capsys.readouterr()
    failed = [line for line in shown.err.splitlines() if line.startswith("failed:")]
    assert len(failed) == 2
    assert "b.png: is empty (0 bytes)" in failed[0]
    assert "d.png" in failed[1]
    assert "outside the image of 2 x 2" in failed[1]
    assert "3 images done, 0 skipped (finished earlier), 2 failed" in shown.out


def test_a_full_disk_stops_the_run(ran, folder, monkeypatch):
    def full(path, scan, labels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict_file.outputs, "write_mask", full)
    with pytest.raises(OutputError, match="out: cannot be written .No space left"):
        predict_path(request(folder))
    assert ran == ["a"]
    assert not any((folder.parent / "out").iterdir())


def test_prompts_by_image(ran, folder, capsys):
    prompts = {
        "a.png": [{"box": BOXES[0], "label": 4, "name": "cell"}],
        "b.png": [{"box": [0] * 4}],
        "gone.png": [{"box": BOXES[0]}],
    }
    path = folder.parent / "prompts.json"
    path.write_text(json.dumps(prompts))
    with pytest.raises(UserError, match="2 of 4 images failed"):
        predict_path(request(folder, boxes=[], prompts=str(path)))
    assert f"left out: {path}: gone.png: no such image" in capsys.readouterr().err
    mask = np.asarray(Image.open(folder.parent / "out" / "a_mask.png"))
    assert set(np.unique(mask)) == {0, 4}


def test_masks_by_image(ran, folder):
    masks = folder.parent / "masks"
    masks.mkdir()
    for name in ("a.png", "b_mask.png"):
        mask = np.zeros((16, 24), np.uint8)
        mask[4:11, 4:14] = 2
        Image.fromarray(mask).save(masks / name)
    with pytest.raises(UserError, match="2 of 4 images failed"):
        predict_path(request(folder, boxes=[], prompt_mask=str(masks)))
    mask = np.asarray(Image.open(folder.parent / "out" / "b_mask.png"))
    assert np.count_nonzero(mask == 2) == 30


def test_what_a_folder_holds(folder, tmp_path):
    assert find_images(str(folder / "a.png")) is None
    assert [image.rsplit("/", 1)[1] for image in find_images(str(folder))][-1] == "c.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no image in this folder"):
        find_images(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="is the folder of the images"):
        predict_path(Request("m", str(folder), folder, boxes=BOXES))


def test_an_absent_checkpoint_stops_the_run(folder, capsys):
    with pytest.raises(UserError, match="nowhere"):
        predict_path(Request("nowhere", str(folder), folder.parent / "out", boxes=BOXES))
    assert "failed" not in capsys.readouterr().err


def test_a_mask_that_was_given_is_never_replaced(ran, folder):
    masks = folder.parent / "masks"
    masks.mkdir()
    mask = np.zeros((16, 24), np.uint8)
    mask[4:11, 4:14] = 2
    Image.fromarray(mask).save(masks / "a_mask.png")
    given = (masks / "a_mask.png").read_bytes()
    for image in (folder / "a.png", folder):
        with pytest.raises(UserError, match="a_mask.png is an input|4 of 4 images failed"):
            predict_path(Request("m", str(image), masks, prompt_mask=str(masks)))
    assert [path.name for path in masks.iterdir()] == ["a_mask.png"]
    assert (masks / "a_mask.png").read_bytes() == given


def test_dicom_beside_pictures_is_found(folder):
    write_series(folder, np.ones((3, 8, 8), np.int16), "1.2.3")
    write_series(folder, np.ones((2, 8, 8), np.int16), "1.2.4")
    found = [image.removeprefix(f"{folder.parent}/") for image in find_images(str(folder))]
    assert found[:2] == ["images#1.2.3", "images#1.2.4"]
    assert len(found) == 6


def test_a_folder_of_one_series_is_that_image(tmp_path):
    write_series(tmp_path / "a #1", np.ones((3, 8, 8), np.int16), "1.2.3")
    assert find_images(str(tmp_path / "a #1")) is None
    write_series(tmp_path / "a #1", np.ones((3, 8, 8), np.int16), "1.2.4")
    assert find_images(str(tmp_path / "a #1")) == [
        f"{tmp_path}/a #1#1.2.3",
        f"{tmp_path}/a #1#1.2.4",
    ]


def test_what_is_left_out_is_named(ran, folder, capsys):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x.png").write_bytes(b"x")
    (folder / "scan.mat").write_bytes(b"MATLAB\0")
    (folder / "._a.png").write_bytes(b"x")
    (folder / "Thumbs.db").write_bytes(b"\0")
    predict_path(request(folder))
    assert ran == ["a", "b", "c.jpg", "c.png"]
    left_out = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert left_out == [
        f"left out: {folder}/scan.mat: .mat is no format that is taken from folders; save it as "
        ".nii.gz or .png, unpack it, or name the file itself",
        f"left out: {folder}/deep: 1 files or series in it; give this folder by --image",
    ]


def test_outputs_are_named_as_the_image_was_given(ran, folder, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (folder / "a.png").rename(store / "7f3a90")
    (folder / "a.png").symlink_to(store / "7f3a90")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"a.png": [{"box": BOXES[0]}]}))
    given = {"image": str(folder / "a.png"), "boxes": [], "prompts": str(prompts)}
    predict_path(request(folder, **given))
    assert ran == ["a"]
    assert (tmp_path / "out" / "a_mask.png").exists()


@pytest.mark.parametrize("name", ["w [v2]", "x #1", "*?", "n\nl", "\u00e9 \u65e5", "q\"'{}"])
def test_any_name(ran, folder, tmp_path, name):
    images = folder.rename(tmp_path / name)
    (images / "a.png").rename(images / f"{name}.png")
    output = tmp_path / f"{name} out"
    predict_path(request(images, image=str(images / f"{name}.png"), output=output))
    assert ran == [name]
    assert np.count_nonzero(np.asarray(Image.open(output / f"{name}_mask.png"))) == 25
    predict_path(request(images, output=output))
    assert sorted(ran) == sorted([name, "b", "c.jpg", "c.png"])  # the first is not done again
