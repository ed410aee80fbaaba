"""Files and pictures: tables that read back, outlines where they belong."""

import csv

import numpy as np
import pytest

from medsam_jax.evaluation import tables
from medsam_jax.evaluation.figures import PREDICTION, PROMPT, TRUTH, overlay, window_around
from medsam_jax.evaluation.journal import Journal, checkpoint_identity
from medsam_jax.evaluation.scoring import decode_runs, encode_runs


def test_overlay_outlines_follow_the_masks():
    image = np.zeros((64, 48, 3), np.uint8)
    truth, prediction = np.zeros((2, 64, 48), bool)
    truth[10:20, 10:20] = True
    prediction[30:40, 10:20] = True
    picture = overlay(image, truth, prediction, np.array([5, 5, 25, 45]))
    factor = picture.shape[0] // 64
    assert picture.shape == (512, 384, 3)
    for colour, rows, columns in ((TRUTH, 10, 10), (PREDICTION, 30, 10), (PROMPT, 5, 5)):
        found = np.argwhere((picture == colour).all(axis=2))
        assert np.abs(found.min(axis=0) - [rows * factor, columns * factor]).max() <= 1
    assert not picture[15 * factor, 15 * factor].any(), "masks are outlined, not filled"
    assert not image.any(), "the image is not drawn on"


def test_overlay_takes_empty_masks_and_large_images():
    image = np.full((600, 700, 3), 9, np.uint8)
    empty = np.zeros((600, 700), bool)
    np.testing.assert_array_equal(overlay(image, empty, empty), image)


def test_window_holds_the_masks():
    masks = np.zeros((2, 100, 200), bool)
    masks[0, 5, 190] = masks[1, 25, 150] = True
    rows, columns = window_around(masks)
    assert masks[:, rows, columns].sum() == 2
    assert (rows.start, columns.stop) == (0, 200)


@pytest.mark.parametrize("fill", [0, 1, 2])
def test_runs_read_back(fill):
    mask = np.random.default_rng(0).integers(0, 2, (7, 9)) if fill == 2 else np.full((7, 9), fill)
    np.testing.assert_array_equal(decode_runs(encode_runs(mask == 1), (7, 9)), mask == 1)


def test_csv_reads_back(tmp_path):
    rows = [{"name": "a,b", "x": 0.123456789, "n": 3}, {"name": "c", "x": float("nan"), "n": 4}]
    tables.write_csv(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read[0] == {"name": "a,b", "x": "0.123457", "n": "3"}
    assert np.isnan(float(read[1]["x"]))
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_latex_escapes_names():
    text = tables.latex(["a", "b", "c", "d"], [["x_y", "50%", r"a\b", "1"]], "A & B")
    assert r"x\_y & 50\% & a\textbackslash{}b & 1 \\" in text
    assert r"\caption{A \& B}" in text


def test_journal_drops_a_cut_line_and_reads_every_process(tmp_path):
    Journal(tmp_path, {"a": 1}, process=0).append([{"n": 1}, {"n": 2}])
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text() + '{"n": 3')
    Journal(tmp_path, {"a": 1}, process=1).append([{"n": 4}])
    journal = Journal(tmp_path, {"a": 1}, process=0)
    journal.append([{"n": 5}])
    assert sorted(row["n"] for row in journal.rows()) == [1, 2, 4, 5]
    assert Journal(tmp_path, {"a": 2}).rows() == []


def test_identity_changes_with_the_checkpoint(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    before = checkpoint_identity(str(tmp_path))
    (tmp_path / "model.json").write_text("{ }")
    assert checkpoint_identity(str(tmp_path)) != before
    assert checkpoint_identity("lite_medsam") == ["lite_medsam"]
