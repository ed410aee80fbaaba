"""Outlines and prompts on slices: where they belong, in one colour each."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from medsam_jax.drawing import (
    OBJECTS,
    PREDICTION,
    PROMPT,
    TRUTH,
    TRUTHS,
    draw,
    figure_of,
    montage,
    overlay,
    save_figures,
    window_around,
)


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


def test_predicted_objects_are_never_in_the_colour_of_the_truth():
    labels = np.zeros((64, 64), np.uint8)
    for label in range(1, 9):  # more objects than colours
        labels[7 * label : 7 * label + 5, 10:50] = label
    drawn = draw(np.zeros((64, 64), np.uint8), labels).reshape(-1, 3)
    colours = {tuple(colour) for colour in drawn.tolist()} - {(0, 0, 0)}
    assert colours == set(OBJECTS)
    assert not {TRUTH, PROMPT} & colours
    assert PREDICTION in colours


def test_prompts_of_both_functions_look_alike():
    image, nothing = np.zeros((64, 64), np.uint8), np.zeros((64, 64), int)
    box, points = np.array([5.0, 6, 20, 30]), np.array([[9.0, 8], [40, 50]])
    prompts = [{"box": box}, {"points": [(*point, 1) for point in points]}]
    np.testing.assert_array_equal(
        overlay(image, box=box, points=points), draw(image, nothing, prompts)
    )


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nothing", "svg"])
def test_figures_need_no_backend(tmp_path, backend):
    program = """
import sys
from pathlib import Path
from medsam_jax.drawing import figure_of, save_figures

def plot():
    figure = figure_of(2, 1)
    figure.subplots().plot([1, 2])
    return figure

assert save_figures(Path(sys.argv[1]), {"a.png": plot}) == ["a.png"]
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_figure_that_fails_costs_a_line(tmp_path, capsys):
    def fail():
        raise ValueError("no font")

    figures = {"a.png": fail, "b.png": lambda: figure_of(2, 1)}
    assert save_figures(tmp_path, figures) == ["b.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
    line = f"warning: {tmp_path}/a.png: not drawn (ValueError: no font); all other results are "
    assert capsys.readouterr().err == line + "written\n"


def shown_slices(labels, prompts):
    """Returns the numbers that a montage writes on its tiles."""
    numbers, put_text = [], cv2.putText

    def keep(tile, text, *rest):
        numbers.append(int(text))
        return put_text(tile, text, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv2, "putText", keep)
        montage(np.zeros((len(labels), 16, 16), np.uint8), labels, prompts)
    return numbers


def test_montage_shows_the_prompted_slices():
    labels = np.zeros((90, 16, 16), np.uint8)
    labels[10:80, 4:9, 4:9] = 1
    evenly = shown_slices(labels, [])
    assert len(evenly) == 20
    prompted = next(index for index in range(10, 80) if index not in evenly)
    shown = shown_slices(labels, [{"slice": prompted}, {"slice": 85}])
    assert {prompted, 85} < set(shown)
    assert shown == sorted(set(shown))
    assert len(shown) == 20
    assert len(set(evenly) & set(shown)) == 18


def test_montage_of_many_prompts_keeps_its_size():
    labels = np.zeros((60, 16, 16), np.uint8)
    labels[:, 4:9, 4:9] = 1
    shown = shown_slices(labels, [{"slice": index} for index in range(60)])
    assert shown == list(range(20))
    labels[5:] = 0
    shown = shown_slices(labels, [{"slice": 30}])
    assert shown == [0, 1, 2, 3, 4, 30]


def test_truth_and_prediction_of_one_label_differ_in_colour():
    assert TRUTHS[0] == TRUTH
    assert PREDICTION not in TRUTHS
    assert TRUTH not in OBJECTS
