"""The predict command: masks on the input's grid, labels, scores; bad input leaves nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medsam_jax.data.scans import read_scan
from medsam_jax.errors import UserError
from medsam_jax.inference.files import Request, predict_file
from medsam_jax.inference.predictor import Predictor
from medsam_jax.models.checkpoint import load_model, save_model
from medsam_jax.models.common import flatten_state


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("predict") / "tiny"
    save_model(directory, flatten_state(model), model.config, {"licence": "none"})
    return str(directory)


@pytest.fixture(scope="module")
def scan_path(tmp_path_factory) -> Path:
    """Oblique, anisotropic and away from the origin: 5 slices of 40 x 30."""
    voxels = np.random.default_rng(0).normal(100, 30, (5, 30, 40)).astype(np.float32)
    image = sitk.GetImageFromArray(np.abs(voxels))
    image.SetSpacing((0.7, 0.9, 4.0))
    image.SetOrigin((-20.0, 11.0, 300.0))
    angle = 0.3
    cos, sin = np.cos(angle), np.sin(angle)
    image.SetDirection((cos, -sin, 0, sin, cos, 0, 0, 0, 1))
    path = tmp_path_factory.mktemp("scan") / "oblique.nii.gz"
    sitk.WriteImage(image, str(path))
    return path


def request(checkpoint, image, output, **changes) -> Request:
    settings = {"boxes": [], "points": [], "modality": "MR"} | changes
    return Request(checkpoint=checkpoint, image=str(image), output=output, **settings)


def test_volume_lands_on_the_input(checkpoint, scan_path, tmp_path):
    boxes = [[5, 4, 30, 20], [20, 10, 39, 29]]
    predict_file(request(checkpoint, scan_path, tmp_path, boxes=boxes, slice_index=2))
    names = ["oblique.json", "oblique_mask.nii.gz", "oblique_overlay.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    image, mask = sitk.ReadImage(str(scan_path)), sitk.ReadImage(str(tmp_path / names[1]))
    for corner in ((0, 0, 0), (39, 29, 4), (7, 3, 1)):
        np.testing.assert_allclose(
            mask.TransformIndexToPhysicalPoint(corner),
            image.TransformIndexToPhysicalPoint(corner),
            atol=1e-3,
        )
    labels = sitk.GetArrayFromImage(mask)
    report = json.loads((tmp_path / names[0]).read_text())
    assert [record["label"] for record in report["objects"]] == [1, 2]
    for record, box in zip(report["objects"], boxes, strict=True):
        voxels = np.count_nonzero(labels == record["label"])
        assert record["voxels"] == voxels
        assert record["volume_ml"] == pytest.approx(voxels * 0.7 * 0.9 * 4 / 1000, rel=1e-5)
        assert record["box"] == box


def test_one_slice_equals_the_predictor(checkpoint, scan_path, tmp_path):
    box = [5, 4, 30, 20]
    predict_file(
        request(checkpoint, scan_path, tmp_path, boxes=[box], slice_index=3, propagate=False)
    )
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "oblique_mask.nii.gz")))
    predictor = Predictor(load_model(checkpoint))
    volume = read_scan(scan_path).array
    grey = predictor.normalise(volume.reshape(-1, 40), "MR").reshape(volume.shape)
    predictor.set_normalised([grey[3]])
    masks, _, _ = predictor.predict(box=box, multimask_output=False)
    assert ((labels[3] == 1) != masks[0]).mean() < 1e-3  # batches of 5 and of 1 round differently
    assert not labels[[0, 1, 2, 4]].any()


def test_picture_with_points(checkpoint, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.PNG")
    output = tmp_path / "out"
    points = [[20, 10, 1], [3, 30, 0]]
    predict_file(request(checkpoint, tmp_path / "photo.PNG", output, points=points, modality=None))
    labels = np.asarray(Image.open(output / "photo_mask.png"))
    assert labels.shape == (33, 47)
    [record] = json.loads((output / "photo.json").read_text())["objects"]
    assert record["point_coords"] == [[20, 10], [3, 30]]
    assert record["voxels"] == np.count_nonzero(labels)
    assert "volume_ml" not in record
    overlay = np.asarray(Image.open(output / "photo_overlay.png"))
    assert overlay.shape[0] / overlay.shape[1] == pytest.approx(33 / 47)


def test_automatic_mode(checkpoint, tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (33, 47), np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    predict_file(request(checkpoint, tmp_path / "photo.png", tmp_path / "out", auto=True))
    labels = np.asarray(Image.open(tmp_path / "out" / "photo_mask.png"))
    objects = json.loads((tmp_path / "out" / "photo.json").read_text())["objects"]
    assert len(objects) == labels.max()
    if not objects:
        assert "no object found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give --auto or prompts"),
        ({"auto": True, "boxes": [[0, 0, 5, 5]]}, "one of the two"),
        ({"boxes": [[0, 0, 5, 5]]}, "has 5 slices; say which by --slice"),
        ({"boxes": [[0, 0, 5, 5]], "slice_index": 5}, "--slice: 5; .* has 0 to 4"),
        ({"boxes": [[0, 0, 5, 5]] * 2, "points": [[1, 1, 1]]}, "points go with one --box"),
        ({"boxes": [[50, 0, 60, 5]], "slice_index": 1}, "outside the image of 40 x 30"),
        ({"points": [[5, 5, 7]], "slice_index": 1}, "point_labels: 7"),
    ],
)
def test_bad_requests_leave_nothing(checkpoint, scan_path, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        predict_file(request(checkpoint, scan_path, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_unwritable_output(checkpoint, tmp_path):
    Image.fromarray(np.eye(20, dtype=np.uint8) * 255).save(tmp_path / "photo.png")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file: cannot be written"):
        predict_file(
            request(checkpoint, tmp_path / "photo.png", tmp_path / "file", boxes=[[1, 1, 9, 9]])
        )


def test_command_line_reports_one_line(tmp_path):
    command = [sys.executable, "-m", "medsam_jax.predict", "--checkpoint", "lite_medsam"]
    command += ["--image", "absent.png", "--output", str(tmp_path), "--box", "1,2,3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: --box: '1,2,3'; give 4 numbers with commas between\n"
