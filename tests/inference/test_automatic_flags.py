"""`predict --auto`: SAM's thresholds as flags, and counts of what each filter has dropped."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medsam_jax.errors import UserError
from medsam_jax.inference.predict_file import FilePredictor, Request
from medsam_jax.inference.predict_folder import predict_path


@pytest.fixture
def ask(monkeypatch, compiled_predictor, tmp_path):
    """Returns the record of a picture's automatic masks under the given settings."""
    monkeypatch.setattr(FilePredictor, "_predictor", compiled_predictor)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 47), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    def ask(**settings):
        output = tmp_path / "out"
        request = Request(
            "tiny", str(tmp_path / "photo.png"), output, auto=True, auto_settings=settings
        )
        predict_path(request)
        return json.loads((output / "photo.json").read_text())

    return ask


def test_each_threshold_drops_what_the_counts_say(ask, capsys):
    off = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    all_kept = ask(**off)["filtered"]
    tried = all_kept.pop("tried")
    assert tried == sum(all_kept.values())
    assert all_kept["kept"] > 1
    assert [all_kept[name] for name in ("predicted IoU", "stability", "overlap")] == [0, 0, 0]
    for changes, reason in (
        ({"pred_iou_thresh": 1.0}, "predicted IoU"),
        ({"stability_score_thresh": 1.0}, "stability"),
        ({"box_nms_thresh": 0.0}, "overlap"),
    ):
        capsys.readouterr()
        record = ask(**off | changes)
        found = record["filtered"]
        assert found[reason] > 0, reason
        assert found["tried"] == tried == sum(found.values()) - tried
        assert found["kept"] == len(record["objects"]) < all_kept["kept"]
        said = re.search(r"photo: (\d+) masks tried, (\d+) kept; (.*)", capsys.readouterr().out)
        assert said.groups()[:2] == (str(tried), str(found["kept"]))
        assert f"{reason} {found[reason]}" in said[3]
        assert record["settings"]["auto_settings"] == off | changes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pred_iou_thresh": 2.0}, "--pred_iou_thresh: 2.0; use a number from 0 to 1"),
        ({"crop_n_layers": -1}, "--crop_n_layers: -1; use a whole number, 0 or more"),
        ({"points_per_side": 8}, "--points_per_side: 8; this checkpoint is prompted by boxes"),
    ],
)
def test_a_wrong_setting_is_one_line(ask, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ask(**settings)
    assert not (tmp_path / "out" / "photo.json").exists()


def test_settings_without_auto_are_refused(tmp_path):
    settings = {"box_nms_thresh": 0.5}
    with pytest.raises(UserError, match="--box_nms_thresh: is for --auto; leave it out"):
        FilePredictor(Request("m", "a.png", tmp_path, boxes=[[0, 0, 5, 5]], auto_settings=settings))


def test_every_threshold_is_a_flag():
    command = [sys.executable, "-m", "medsam_jax.predict", "--help"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    for name in ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
        assert f"--{name}" in text
    for name in ("crop_n_layers", "min_mask_region_area"):
        assert f"--{name}" in text
