"""Tests of wrong predict command lines: one line of error, status 1, nothing written."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state

# All command lines go through one process: starting one takes longer than failing does.
SCRIPT = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from medsam_jax import cli, predict

answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["predict", *arguments]
    shown = io.StringIO()
    saved = flagsaver.save_flag_values()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.run(predict.main)
        except SystemExit as end:
            code = end.code
    flagsaver.restore_flag_values(saved)
    flags.FLAGS.unparse_flags()
    answers.append([code, shown.getvalue()])
print(json.dumps(answers))
"""

PICTURE = ["--image", "photo.png"]
VOLUME = ["--image", "scan.nii.gz", "--slice", "1"]
BOX = ["--box", "1,1,9,9"]
CASES = {
    "no_prompt": (PICTURE, "prompt: nothing given"),
    "two_ways": ([*PICTURE, *BOX, "--auto"], "--box, --point and --auto given; give one"),
    "box_of_three": ([*PICTURE, "--box", "1,2,3"], "--box: '1,2,3'; give x0,y0,x1,y1"),
    "box_outside": (
        [*PICTURE, "--box", "50,0,60,5"],
        "photo.png: object 1, slice 0: box: (50, 0, 60, 5) is outside the image of 20 x 16",
    ),
    "box_inverted": ([*VOLUME, "--box", "9,9,1,1"], "is inverted; give x0, y0, x1, y1"),
    "point_without_label": ([*PICTURE, "--point", "5,5"], "--point: '5,5'; give x,y,label"),
    "label_of_seven": ([*PICTURE, "--point", "5,5,7"], "point_labels: 7"),
    "point_outside": ([*PICTURE, "--point", "5,16,1"], "(5, 16) is outside"),
    "points_and_boxes": ([*PICTURE, *BOX, *BOX, "--point", "5,5,1"], "points go with one --box"),
    "absent_image": (["--image", "no.png", *BOX], "no.png: does not exist"),
    "empty_image": (["--image", "empty.png", *BOX], "empty.png: is empty (0 bytes)"),
    "not_a_number": (["--image", "nan.mha", *BOX, "--slice", "0"], "nan.mha: 1 voxels are NaN"),
    "constant": (
        ["--image", "constant.mha", *BOX, "--slice", "0"],
        "constant.mha: image: constant",
    ),
    "four_dimensions": (["--image", "4d.nii.gz", *BOX], "4d.nii.gz: has 4 dimensions"),
    "no_slice": (["--image", "scan.nii.gz", *BOX], "has 5 slices; say which by --slice"),
    "slice_outside": (["--image", "scan.nii.gz", *BOX, "--slice", "5"], "--slice: 5;"),
    "modality": ([*VOLUME, *BOX, "--modality", "CTT"], "--modality: 'CTT' is unknown"),
    "window_of_mr": ([*VOLUME, *BOX, "--modality", "MR", "--window", "lung"], "is for CT"),
    "window_alone": (
        [*VOLUME, *BOX, "--window", "lung"],
        "'lung' needs --modality CT; scan.nii.gz has none",
    ),
    "slice_of_picture": ([*PICTURE, *BOX, "--slice", "3"], "photo.png has one slice"),
    "slice_and_mask": (
        ["--image", "scan.nii.gz", "--slice", "3", "--prompt_mask", "constant.mha"],
        "a --prompt_mask says its slices itself",
    ),
    "clean_automatic": ([*PICTURE, "--auto", "--fill_holes"], "--auto gives objects as they are"),
    "output_over_prompts": (
        [*PICTURE, "--prompts", "photo.json", "--output", "."],
        "photo.png: photo.json is an input; choose another --output folder",
    ),
    "output_over_coco": (
        [*PICTURE, "--prompts", "coco.json", "--output", "."],
        "photo.png: coco.json is an input; choose another --output folder",
    ),
    "numbered_name": (
        [*PICTURE, "--prompts", "named.json"],
        "named.json: photo.png, prompt 1: name 5; give a text",
    ),
    "masks_for_folder": (["--image", ".", "--prompt_mask", "photo.png"], "photo.png is no folder"),
    "window_of_recipe": (
        [*VOLUME, *BOX, "--modality", "CT", "--window", "wide", "--checkpoint", "v2"],
        "window: 'wide' is not one of recipe v2's: soft_tissue, lung, brain",
    ),
    "follow": ([*VOLUME, *BOX, "--follow", "up"], "--follow: 'up'; use one of propagate"),
    "one_box_interpolated": ([*VOLUME, *BOX, "--follow", "interpolate"], "boxes on two slices"),
    "mask_format": ([*VOLUME, *BOX, "--mask_format", "jpg"], "--mask_format: 'jpg'; use one of"),
    "png_of_volume": ([*VOLUME, *BOX, "--mask_format", "png"], "has 5 slices; use tif"),
    "seg_of_picture": ([*PICTURE, *BOX, "--mask_format", "dcm"], "is no DICOM series"),
    "output_is_file": ([*PICTURE, *BOX, "--output", "photo.png"], "photo.png is a file"),
    "checkpoint": ([*PICTURE, *BOX, "--checkpoint", "nowhere"], "nowhere"),
    "absent_json": ([*PICTURE, "--prompts", "no.json"], "no.json: cannot be read"),
    "broken_json": ([*PICTURE, "--prompts", "broken.json"], "broken.json: is not JSON"),
    "unlabelled_json": (
        [*PICTURE, "--prompts", "unlabelled.json"],
        "unlabelled.json: photo.png, prompt 1: points [[5, 5]]; give [[x, y, label], ...]",
    ),
    "other_json": ([*VOLUME, "--prompts", "other.json"], "add 'scan.nii.gz'"),
    "absent_mask": ([*PICTURE, "--prompt_mask", "no.png"], "no.png: does not exist"),
    "mask_of_size": ([*PICTURE, "--prompt_mask", "constant.mha"], "without physical geometry"),
    "misspelt_flag": ([*PICTURE, *BOX, "--outptu", "x"], "Unknown command line flag 'outptu'"),
}


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory):
    """Name -> status and stderr; also checks that nothing was written."""
    folder = tmp_path_factory.mktemp("bad")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 20), np.uint8)).save(folder / "photo.png")
    (folder / "empty.png").write_bytes(b"")
    scan = rng.normal(100, 20, (5, 16, 20)).astype(np.float32)
    holed = scan.copy()
    holed[2, 3, 4] = np.nan
    for name, array in {
        "scan.nii.gz": scan,
        "nan.mha": holed,
        "constant.mha": scan * 0 + 7,
    }.items():
        sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / name))
    four = sitk.JoinSeries([sitk.GetImageFromArray(scan)] * 3)
    sitk.WriteImage(four, str(folder / "4d.nii.gz"))
    (folder / "broken.json").write_text("{'photo.png': 1}")
    (folder / "unlabelled.json").write_text('{"photo.png": [{"points": [[5, 5]]}]}')
    for name in ("photo.json", "coco.json"):
        (folder / name).write_text('{"photo.png": [{"box": [1, 1, 9, 9]}]}')
    (folder / "named.json").write_text('{"photo.png": [{"box": [1, 1, 9, 9], "name": 5}]}')
    (folder / "other.json").write_text('{"photo.png": [{"box": [1, 1, 9, 9]}]}')
    for name in ("lite", "v2"):
        preprocessing = dataclasses.replace(model.config.preprocessing, recipe=name)
        config = dataclasses.replace(model.config, preprocessing=preprocessing)
        save_model(folder / name, flatten_state(model), config, {"licence": "none"})
    lines = []
    for arguments, _ in CASES.values():
        defaults = {"--checkpoint": "lite", "--output": "out"}
        extra = [v for k, v in defaults.items() if k not in arguments for v in (k, v)]
        lines.append([*extra, *arguments])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "out").exists()
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what(answers, name):
    status, shown = answers[name]
    assert status == 1
    [line] = [line for line in shown.splitlines() if not line.startswith("compiling ")]
    assert line.startswith("error: ")
    assert CASES[name][1] in line
