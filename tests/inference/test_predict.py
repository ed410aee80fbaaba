"""The predict command through a real (tiny) model: what is written, what the record says."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medsam_jax.data.run_lengths import decode_rle, encode_rle
from medsam_jax.inference import mask_records
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator
from medsam_jax.inference.predict_file import FilePredictor, Request
from medsam_jax.inference.predict_folder import predict_path
from medsam_jax.io.scans import read_scan
from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("predict") / "tiny"
    save_model(directory, flatten_state(model), model.config, {"licence": "none"})
    return str(directory)


@pytest.fixture
def compiled(monkeypatch, compiled_predictor):
    """Requests use the model that other tests have compiled."""
    monkeypatch.setattr(FilePredictor, "_predictor", compiled_predictor)


@pytest.fixture(scope="module")
def scan_path(tmp_path_factory) -> Path:
    voxels = np.random.default_rng(0).normal(100, 30, (3, 30, 40)).astype(np.float32)
    image = sitk.GetImageFromArray(np.abs(voxels))
    image.SetSpacing((0.7, 0.9, 4.0))
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    sitk.WriteImage(image, str(path))
    return path


def picture(path: Path, shape=(33, 47, 3)) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).save(path)
    return path


def test_volume(compiled, scan_path, tmp_path):
    boxes = [[5, 4, 30, 20], [20, 10, 39, 29]]
    settings = {"modality": "MR", "slice_index": 1, "gif": True}
    predict_path(Request("tiny", str(scan_path), tmp_path, boxes=boxes, **settings))
    names = ["scan.gif", "scan.json", "scan_mask.nii.gz", "scan_montage.png", "scan_overlay.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "scan_mask.nii.gz")))
    record = json.loads((tmp_path / "scan.json").read_text())
    assert record["spacing_mm"] == pytest.approx([4.0, 0.9, 0.7], rel=1e-6)
    assert [found["label"] for found in record["objects"]] == [1, 2]
    for found, box in zip(record["objects"], boxes, strict=True):
        voxels = np.count_nonzero(labels == found["label"])
        assert found["voxels"] == voxels
        assert found["volume_ml"] == pytest.approx(voxels * 0.7 * 0.9 * 4 / 1000, rel=1e-5)
        assert found["prompts"] == [{"slice": 1, "box": box}]
        scores = list(found["slice_scores"].values())
        assert found["predicted_iou"] == pytest.approx(np.mean(scores))
    with Image.open(tmp_path / "scan.gif") as gif:
        assert 1 <= gif.n_frames <= 3


def test_through_a_checkpoint_as_the_predictor(checkpoint, predictor, scan_path, tmp_path):
    box = [5, 4, 30, 20]
    settings = {"modality": "MR", "slice_index": 2, "follow": "off"}
    predict_path(Request(checkpoint, str(scan_path), tmp_path, boxes=[box], **settings))
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "scan_mask.nii.gz")))
    volume = read_scan(scan_path).array
    grey = predictor.normalise(volume.reshape(-1, 40), "MR").reshape(volume.shape)
    predictor.set_normalised([grey[2]])
    masks, _, _ = predictor.predict(box=box, multimask_output=False)
    assert ((labels[2] == 1) != masks[0]).mean() < 1e-3  # batches of 3 and of 1 round differently
    assert not labels[[0, 1]].any()


def test_picture_with_points(compiled, tmp_path):
    points = [[20, 10, 1], [3, 30, 0]]
    output = tmp_path / "out"
    predict_path(Request("tiny", str(picture(tmp_path / "photo.PNG")), output, points=points))
    labels = np.asarray(Image.open(output / "photo_mask.png"))
    assert labels.shape == (33, 47)
    [found] = json.loads((output / "photo.json").read_text())["objects"]
    assert found["prompts"] == [{"slice": 0, "points": points}]
    assert found["area_px"] == np.count_nonzero(labels)
    assert "volume_ml" not in found
    assert "longest_px" in found
    assert not (output / "photo_montage.png").exists()
    overlay = np.asarray(Image.open(output / "photo_overlay.png"))
    assert overlay.shape[0] / overlay.shape[1] == pytest.approx(33 / 47)
    coco = json.loads((output / "coco.json").read_text())
    assert coco["images"] == [{"id": 1, "file_name": "photo.PNG", "height": 33, "width": 47}]
    [annotation] = coco["annotations"]
    assert annotation["area"] == found["area_px"]
    assert _decompressed(annotation["segmentation"]) == encode_rle(labels == 1)["counts"]


def _decompressed(rle) -> list[int]:
    """COCO's run lengths from their text, written from the format's description."""
    counts, value, shift = [], 0, 0
    for character in rle["counts"]:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


def test_automatic_mode(compiled, tmp_path, capsys):
    image = picture(tmp_path / "photo.png", (33, 47))
    predict_path(Request("tiny", str(image), tmp_path / "out", auto=True))
    labels = np.asarray(Image.open(tmp_path / "out" / "photo_mask.png"))
    objects = json.loads((tmp_path / "out" / "photo.json").read_text())["objects"]
    assert len(objects) == labels.max()
    if not objects:
        assert "photo: no object found; the mask is empty" in capsys.readouterr().out


@pytest.mark.parametrize(("thickness", "reached"), [(1.0, range(2, 19)), (3.0, range(8, 13))])
def test_propagation_measures_in_the_files_millimetres(bright, tmp_path, thickness, reached):
    image = sitk.GetImageFromArray(np.full((21, 30, 30), 200, np.uint8))
    image.SetSpacing((1.0, 1.0, thickness))
    sitk.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    request = {"boxes": [[10, 10, 21, 21]], "slice_index": 10}  # 12 mm: 9 mm to each side
    predict_path(Request("m", str(tmp_path / "scan.nii.gz"), tmp_path / "out", **request))
    [found] = json.loads((tmp_path / "out" / "scan.json").read_text())["objects"]
    assert [int(index) for index in found["slice_scores"]] == list(reached)


def test_multi_page_tiff_keeps_its_pages(compiled, tmp_path):
    pages = [
        Image.fromarray(p) for p in np.random.default_rng(0).integers(0, 256, (3, 20, 24), np.uint8)
    ]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    request = Request("tiny", str(tmp_path / "stack.tif"), tmp_path / "out", boxes=[[2, 2, 20, 15]])
    predict_path(Request(**(vars(request) | {"slice_index": 1})))
    with Image.open(tmp_path / "out" / "stack_mask.tif") as mask:
        assert mask.n_frames == 3


@pytest.mark.parametrize("known", ["none", "in plane", "all"])
def test_voxels_are_not_called_millimetres(bright, tmp_path, known):
    """ITK takes 1 mm where a header has no spacing."""
    volume = np.zeros((5, 40, 40), np.uint8)
    volume[1:4, 10:20, 12:32] = 255
    spacings = {"none": "", "in plane": "spacings: 0.5 0.5 nan\n", "all": "spacings: 0.5 0.5 2\n"}
    header = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 40 40 5\nencoding: raw\n"
    path = tmp_path / "scan.nrrd"
    path.write_bytes(f"{header}{spacings[known]}\n".encode() + volume.tobytes())
    boxes = [[10, 8, 34, 22]]
    predict_path(Request("tiny", str(path), tmp_path / "out", boxes=boxes, slice_index=2))
    record = json.loads((tmp_path / "out" / "scan.json").read_text())
    (found,) = record["objects"]
    unit, side = ("px", 1.0) if known == "none" else ("mm", 0.5)
    assert found[f"longest_{unit}"] == pytest.approx(np.hypot(19.5, 9.5) * side, rel=0.05)
    assert {"longest_px", "longest_mm"} & set(found) == {f"longest_{unit}"}
    if known == "all":
        assert found["volume_ml"] == pytest.approx(600 * 0.5 / 1000)
    else:
        assert "volume_ml" not in found
    assert (record["spacing_mm"][0] is None) == (known != "all")


def test_values_that_are_no_hounsfield_units_are_said(bright, tmp_path, caplog):
    volume = np.full((1, 40, 40), 24, np.int16)
    volume[0, 10:20, 12:32] = 1100
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(tmp_path / "scan.nrrd"))
    ask = {"boxes": [[10, 8, 34, 22]], "modality": "CT"}
    predict_path(Request("tiny", str(tmp_path / "scan.nrrd"), tmp_path / "out", **ask))
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"{tmp_path / 'scan.nrrd'}: a CT without a negative value (24 to 1100)")


def test_rle_in_the_record_is_the_mask(bright, tmp_path):
    array = np.zeros((20, 30), np.uint8)
    array[4:9, 10:22] = 250
    Image.fromarray(array).save(tmp_path / "a.png")
    predict_path(Request("m", str(tmp_path / "a.png"), tmp_path / "out", boxes=[[8, 2, 25, 12]]))
    [found] = json.loads((tmp_path / "out" / "a.json").read_text())["objects"]
    counts = _decompressed(found["segmentation"])
    mask = decode_rle({"size": [20, 30], "counts": counts})
    np.testing.assert_array_equal(mask, array > 0)
    assert found["bbox"] == [10, 4, 12, 5]
    # Outlines run halfway between pixels: corners are cut by half a pixel.
    assert found["longest_px"] == pytest.approx(np.hypot(12, 4), abs=0.1)


def test_bounding_boxes_are_coco_s_in_every_output(compiled, tmp_path, monkeypatch):
    """Width and height are numbers of pixels: in Python's answers, the record and coco.json."""
    module = "medsam_jax.inference.automatic_mask_generator"
    monkeypatch.setattr(f"{module}._THRESHOLDS", {"boxes": (0.0, 0.0)})
    monkeypatch.setattr(mask_records, "box_grid", lambda shape, sides: np.array([[5.0, 4, 40, 28]]))
    image = picture(tmp_path / "photo.png")
    predictor = FilePredictor._predictor
    [answer] = AutomaticMaskGenerator(predictor).generate(np.asarray(Image.open(image)))
    found = [(answer["bbox"], answer["segmentation"])]
    for flags in ({"auto": True}, {"boxes": [[5, 4, 40, 28]]}):
        output = tmp_path / "_".join(flags)
        predict_path(Request("tiny", str(image), output, **flags))
        mask = np.asarray(Image.open(output / "photo_mask.png")) > 0
        [record] = json.loads((output / "photo.json").read_text())["objects"]
        [annotation] = json.loads((output / "coco.json").read_text())["annotations"]
        found += [(record["bbox"], mask), (annotation["bbox"], mask)]
    for (x, y, width, height), mask in found:
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        assert (x, y) == (columns[0], rows[0])
        assert (x + width, y + height) == (columns[-1] + 1, rows[-1] + 1)


def test_other_formats_on_request(bright, scan_path, tmp_path):
    request = {"boxes": [[2, 2, 20, 20]], "slice_index": 1, "modality": "MR"}
    predict_path(Request("m", str(scan_path), tmp_path, **request, mask_format="nrrd"))
    mask = sitk.ReadImage(str(tmp_path / "scan_mask.nrrd"))
    assert mask.GetSpacing() == pytest.approx((0.7, 0.9, 4.0), rel=1e-6)


def test_empty_masks_are_said_and_written(bright, tmp_path, capsys):
    Image.fromarray(np.pad(np.full((4, 4), 200, np.uint8), 8)).save(tmp_path / "a.png")
    predict_path(Request("m", str(tmp_path / "a.png"), tmp_path / "out", boxes=[[0, 0, 5, 5]]))
    assert "a: object 1: nothing found; its mask is empty" in capsys.readouterr().out
    assert not np.asarray(Image.open(tmp_path / "out" / "a_mask.png")).any()
    [found] = json.loads((tmp_path / "out" / "a.json").read_text())["objects"]
    assert (found["area_px"], found["longest_px"], found["bbox"]) == (0, 0, [0, 0, 0, 0])


def test_largest_component_and_holes(bright, tmp_path):
    array = np.zeros((30, 30), np.uint8)
    array[5:15, 5:15] = 250
    array[9:11, 9:11] = 0
    array[20:22, 20:22] = 250
    Image.fromarray(array).save(tmp_path / "a.png")
    settings = {"boxes": [[0, 0, 29, 29]], "largest_component": True, "fill_holes": True}
    predict_path(Request("m", str(tmp_path / "a.png"), tmp_path / "out", **settings))
    expected = np.zeros((30, 30), np.uint8)
    expected[5:15, 5:15] = 1
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "a_mask.png")), expected)
