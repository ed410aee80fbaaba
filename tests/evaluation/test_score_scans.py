"""The volumes route: masks back in the scan's grid, scored in mm; annotators; refusals."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import SimpleITK as sitk

from medsam_jax.data.manifest import DATA_SET
from medsam_jax.data.splits import split_of
from medsam_jax.errors import UserError
from medsam_jax.evaluation import base, run, score_scans, scorers
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.metrics import normalized_surface_dice
from tests.evaluation.fakes import BrightInBox
from tests.evaluation.scans import SPACING, write, write_manifest


def evaluation(manifest, **settings):
    output = manifest.parent / "out"
    return score_scans.VolumeEvaluation(manifest, None, [Protocol()], 2.0, 4, output, **settings)


def predictions_on_disk(manifest, row):
    """A row's masks, put together from the files: the prediction is what is bright in the boxes."""
    scan = sitk.GetArrayFromImage(sitk.ReadImage(str(manifest.parent / f"{row.case_id}.nii.gz")))
    path = manifest.parent / f"{row.case_id}_mask.nii.gz"
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(path))) == row.label
    boxes = np.zeros_like(truth)
    for box, plane in zip(boxes, truth, strict=True):
        if plane.any():
            rows, columns = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return (scan > 300) & boxes, truth


def test_scores_in_the_scans_grid(manifest):
    """The model answers on a grid of 256 pixels; enlarging and reducing costs part of a pixel."""
    rows = evaluation(manifest).evaluate("0.5")
    assert [(row.case_id, row.label) for row in rows] == [
        *(("one", 1), ("one", 3)),
        *(("two", 1), ("two", 3)),
    ]
    for row in rows:
        prediction, truth = predictions_on_disk(manifest, row)
        assert row.truth_size == truth.sum()
        assert row.predicted_size == pytest.approx(prediction.sum(), rel=0.05)
        expected = normalized_surface_dice(prediction, truth, SPACING, 2.0)
        assert row.scores["nsd"] == pytest.approx(expected, abs=0.02)


def model_trained_in(name, threshold):
    """A model whose contract names that CT window; "released" names none."""
    model = BrightInBox(threshold)
    windows = () if name == "released" else (name,)
    contract = dataclasses.replace(model.config.preprocessing, ct_windows=windows)
    model.config.preprocessing = contract
    return model


def test_ct_in_the_window_of_the_case_or_else_of_the_checkpoint(manifest, monkeypatch):
    """900 HU are grey level 238 in the widest window, 255 in soft tissue: 0.95 lies between."""
    monkeypatch.setattr(base, "load_model", lambda name: model_trained_in(name, 0.95))
    found = {name: evaluation(manifest).evaluate(name)[0] for name in ("released", "soft_tissue")}
    assert found["released"].predicted_size == 0
    assert found["soft_tissue"].scores["dice"] > 0.9
    first = manifest.read_text().splitlines()[1]
    write_manifest(manifest, [[*first.split(","), "wide"]], extra=("window",))
    (named, _) = evaluation(manifest).evaluate("soft_tissue")
    assert named.predicted_size == 0


@pytest.mark.parametrize("name", ["released", "soft_tissue"])
def test_pictures_show_ct_in_the_window_that_the_model_was_shown(manifest, monkeypatch, name):
    """The background, -400 HU, is dark grey in the widest window and black in soft tissue."""
    monkeypatch.setattr(base, "load_model", lambda name: model_trained_in(name, 0.5))
    scans = evaluation(manifest)
    row = scans.evaluate(name)[0]
    assert row.modality == "CT"
    picture = scans.picture(row)
    darkest = {"released": int((-400 + 500) / 1500 * 255), "soft_tissue": 0}[name]
    assert (picture == darkest).all(axis=2).mean() > 0.3


def test_dice_equals_simpleitk(manifest, monkeypatch):
    """The very masks that are scored, given to SimpleITK's overlap filter."""
    scored = []
    original = base.mask_scores

    def keep(prediction, truth, *rest):
        scores = original(prediction, truth, *rest)
        if prediction.ndim == 3:
            scored.append((prediction, truth, scores["dice"]))
        return scores

    monkeypatch.setattr(base, "mask_scores", keep)
    rows = evaluation(manifest).evaluate("0.5")
    assert len(scored) == len(rows) == 4
    for prediction, truth, dice in scored:
        overlap = sitk.LabelOverlapMeasuresImageFilter()
        overlap.Execute(*(sitk.GetImageFromArray(m.astype(np.uint8)) for m in (prediction, truth)))
        assert dice == pytest.approx(overlap.GetDiceCoefficient(), abs=1e-12)


def test_a_killed_run_repeats_one_case_at_most(manifest):
    whole = evaluation(manifest).evaluate("0.5")
    path = next((manifest.parent / "out" / "parts").iterdir())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:100])
    assert evaluation(manifest).evaluate("0.5") == whole
    resumed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["objects"][0]["case_id"] for entry in resumed] == ["one", "two"]


def test_a_case_put_right_or_taken_out_leaves_the_others_as_they_are(manifest, monkeypatch):
    """Their rows are neither scored again nor prompted otherwise."""
    shifted = [Protocol(box_shift=9)]
    settings = (None, shifted, 2.0, 4, manifest.parent / "out")
    one, two = (
        [
            row
            for row in score_scans.VolumeEvaluation(manifest, *settings).evaluate("0.5")
            if keep(row)
        ]
        for keep in (lambda row: row.case_id == "one", lambda row: row.case_id == "two")
    )
    scored = []
    original = score_scans.VolumeEvaluation._score_case
    monkeypatch.setattr(
        score_scans.VolumeEvaluation,
        "_score_case",
        lambda self, *args: scored.append(self.cases[args[1]].case_id) or original(self, *args),
    )
    path = manifest.parent / "one_mask.nii.gz"
    path.write_bytes(path.read_bytes())
    assert score_scans.VolumeEvaluation(manifest, *settings).evaluate("0.5") == one + two
    assert scored == ["one"]
    head, _, last = manifest.read_text().splitlines()
    manifest.write_text(f"{head}\n{last}\n")
    assert score_scans.VolumeEvaluation(manifest, *settings).evaluate("0.5") == [
        dataclasses.replace(row, item=0) for row in two
    ]
    assert scored == ["one"]
    settings = (*settings[:-1], manifest.parent / "afresh")
    assert score_scans.VolumeEvaluation(manifest, *settings).evaluate("0.5")[0].box == two[0].box


def test_a_slice_is_embedded_once_for_all_box_shifts(manifest, monkeypatch):
    asked = []
    original = base.SlicePredictor.run

    def run_and_keep(self, tasks, *args):
        return original(self, (asked.append(task) or task for task in tasks), *args)

    monkeypatch.setattr(base.SlicePredictor, "run", run_and_keep)
    shifts = [Protocol(box_shift=shift) for shift in (0, 6)]
    out = manifest.parent / "out"
    both = score_scans.VolumeEvaluation(manifest, None, shifts, 2.0, 4, out).evaluate("0.5")
    names = [task.name for task in asked]
    assert len(names) == len(set(names)) > 0
    one = score_scans.VolumeEvaluation(manifest, None, shifts[1:], 2.0, 4, out).evaluate("0.5")
    assert [row for row in both if row.box_shift == 6] == one
    assert [row.scores["dice"] for row in both if row.box_shift == 0] != [
        row.scores["dice"] for row in one
    ]


def test_annotators_are_scored_like_models(manifest, monkeypatch):
    with manifest.open() as file:
        rows = list(csv.reader(file))[1:]
    rows = [[*row, f"{row[0]}_reader.nii.gz"] for row in rows]
    write_manifest(manifest, rows, ["mask_reader"])
    monkeypatch.setattr(scorers, "resolve", float)
    monkeypatch.setattr(scorers, "read_config", lambda threshold: BrightInBox(threshold).config)
    monkeypatch.setattr(scorers, "read_metadata", lambda threshold: {})
    settings = {"manifest": str(manifest), "with_burden": True, "box_shifts": [0, 9]}
    run.evaluate(["0.5"], manifest.parent / "out", **settings)
    with (manifest.parent / "out" / "per_object.csv").open() as file:
        scores = list(csv.DictReader(file))
    pairs = {(row["checkpoint"], row["reference"]) for row in scores}
    assert pairs == {
        *(("0.5", "mask"), ("0.5", "reader")),
        *(("annotator mask", "reader"), ("annotator reader", "mask")),
    }
    one, other = (
        [row["dice"] for row in scores if row["checkpoint"] == f"annotator {name}"]
        for name in ("mask", "reader")
    )
    assert one == other, "the Dice coefficient of two annotators has no direction"
    exact = [row for row in scores if row["checkpoint"] != "0.5" and row["label"] == "3"]
    assert {row["dice"] for row in exact} == {"1.000000"}
    figures = ("figures/burden_1.png", "figures/box_shift.png")
    for name in ("per_slice.csv", "burden.csv", "burden_agreement.csv", *figures):
        assert (manifest.parent / "out" / name).stat().st_size > 0
    assert "annotator reader" in (manifest.parent / "out" / "summary.md").read_text()


def test_an_annotator_who_sees_it_elsewhere_or_not_at_all(manifest):
    """Its largest slice has no prompt; what it lacks is spurious, and the distance is infinite."""
    elsewhere = np.zeros((9, 100, 128), np.uint8)
    elsewhere[8, 45:55, 35:45] = 1
    write(manifest.parent / "one_reader.nii.gz", elsewhere)
    row = ["one", "one.nii.gz", "one_mask.nii.gz", "CT", "balls", "one_reader.nii.gz"]
    write_manifest(manifest, [row], ["mask_reader"])
    rows = {(row.label, row.reference): row for row in evaluation(manifest).evaluate("0.5")}
    assert rows[1, "reader"].slice_index == 8
    assert rows[1, "reader"].box is None
    assert (rows[1, "reader"].truth_size, rows[1, "reader"].scores["dice"]) == (100, 0)
    assert (rows[3, "reader"].truth_size, rows[3, "reader"].scores["hd95"]) == (0, np.inf)
    assert rows[1, "mask"].box


def test_slices_are_scored_in_pixels(manifest):
    scans = evaluation(manifest)
    scans.evaluate("0.5")
    row = next(r for r in scans.slice_rows if (r.case_id, r.label) == ("one", 1))
    assert (row.slice_index, row.unit) == (1, "px")
    assert 0 < row.scores["nsd"] <= 1


def test_pictures_are_scored_in_two_dimensions(tmp_path, monkeypatch):
    import cv2

    monkeypatch.setattr(base, "load_model", lambda name: BrightInBox(float(name)))
    truth = np.zeros((256, 256), np.uint8)
    truth[100:130, 90:140] = 1
    cv2.imwrite(str(tmp_path / "mask.png"), truth)
    cv2.imwrite(str(tmp_path / "image.png"), np.roll(truth, 3, axis=1) * 255)
    path = write_manifest(tmp_path / "cases.csv", [["p", "image.png", "mask.png", "photo", "t"]])
    (row,) = evaluation(path, with_burden=True).evaluate("0.5")
    moved = np.roll(truth, 3, axis=1)
    moved[:, 140:] = 0
    assert row.scores["nsd"] == normalized_surface_dice(moved == 1, truth == 1, (1, 1), 2.0)
    assert row.unit == "px"
    assert np.isnan(row.burden["truth_volume_ml"])


def test_a_mask_elsewhere_is_refused_by_name(manifest):
    path = manifest.parent / "two_mask.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetOrigin((5000.0, 0.0, 0.0))
    sitk.WriteImage(image, str(path))
    with pytest.raises(UserError, match=r"case two \(balls, MR\): .*two_mask.nii.gz"):
        evaluation(manifest).evaluate("0.5")


def test_a_mask_of_another_shape_is_refused_by_name(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(base, "load_model", lambda name: BrightInBox(float(name)))
    Image.fromarray(np.zeros((50, 60), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.ones((60, 50), np.uint8)).save(tmp_path / "mask.png")
    path = write_manifest(tmp_path / "cases.csv", [["p", "image.png", "mask.png", "US", "t"]])
    with pytest.raises(UserError, match=r"case p \(t, US\): .*mask.png"):
        evaluation(path).evaluate("0.5")


def test_a_stack_without_spacing_is_refused_by_name(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(base, "load_model", lambda name: BrightInBox(float(name)))
    pages = [Image.fromarray(np.full((40, 50), 1, np.uint8)) for _ in range(3)]
    for name in ("image", "mask"):
        pages[0].save(tmp_path / f"{name}.tiff", save_all=True, append_images=pages[1:])
    path = write_manifest(tmp_path / "cases.csv", [["p", "image.tiff", "mask.tiff", "US", "t"]])
    with pytest.raises(UserError, match=r"case p \(t, US\): .*spacing .*nan.* positive mm"):
        evaluation(path).evaluate("0.5")


@pytest.mark.parametrize("labels", [["1", "1"], ["0"], ["-2"], ["spleen"]])
def test_labels_that_mean_nothing_are_refused(manifest, labels):
    with pytest.raises(UserError, match=f"--labels: .*{labels[0]}"):
        run.evaluate(["0.5"], manifest.parent / "out", manifest=str(manifest), labels=labels)
    assert not (manifest.parent / "out").exists()


def test_a_scan_of_one_intensity_is_refused_by_name(manifest):
    write(manifest.parent / "two.nii.gz", np.full((7, 120, 90), 300, np.int16))
    with pytest.raises(UserError, match=r"case two \(balls, MR\): .*two.nii.gz: .*constant"):
        evaluation(manifest).evaluate("0.5")


def test_ct_that_is_not_in_hounsfield_units_is_said(manifest, caplog):
    path = manifest.parent / "one.nii.gz"
    write(path, sitk.GetArrayFromImage(sitk.ReadImage(str(path))) + 1024)
    evaluation(manifest).evaluate("0.5")
    (line,) = (r.getMessage() for r in caplog.records if "probably not in HU" in r.getMessage())
    assert line.startswith(f"case one (balls, CT): {path}: a CT without a negative value (624 to")


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ([0.0, 1.0, 1.0], r"has the spacing \[0\.0, 1\.0, 1\.0\] \(x, y, z\); store positive mm"),
        ([np.nan, 1.0, 1.0], r"has the spacing \[1\.0, 1\.0, nan\] .*positive mm"),
    ],
)
def test_a_spacing_that_is_not_positive_is_refused_by_name(tmp_path, monkeypatch, spacing, message):
    monkeypatch.setattr(base, "load_model", lambda name: BrightInBox(float(name)))
    volume = np.ones((3, 40, 50), np.uint8)
    np.savez(tmp_path / "scan.npz", imgs=volume, gts=volume, spacing=spacing)
    path = write_manifest(tmp_path / "cases.csv", [["p", "scan.npz", "scan.npz", "MR", "t"]])
    with pytest.raises(UserError, match=rf"case p \(t, MR\): .*scan\.npz: {message}"):
        evaluation(path).evaluate("0.5")


def test_labels_choose(manifest):
    assert {row.label for row in evaluation(manifest, labels=[3]).evaluate("0.5")} == {3}


def test_output_that_is_not_finite_is_refused_by_name(manifest):
    with pytest.raises(UserError, match=r"case one \(balls, CT\), slice 1: .*not finite"):
        evaluation(manifest).evaluate("nan")


def test_a_split_is_scored_as_the_build_made_it_and_named(manifest, capsys):
    """Without a column `split` the hash decides, as in `datasets.build`."""
    lines = manifest.read_text().splitlines()
    held_out = next(
        name for name in map("p{}".format, range(99)) if split_of(DATA_SET, name) == "validation"
    )
    manifest.write_text("\n".join([*lines, lines[1].replace("one,", f"{held_out},", 1)]))
    settings = ([Protocol()], 2.0, 4, manifest.parent / "out")
    scans = score_scans.VolumeEvaluation(manifest, "validation", *settings)
    assert [case.case_id for case in scans.cases] == [held_out]
    assert scans.title == f"1 scans of `{manifest}` (1 validation)"
    every = score_scans.VolumeEvaluation(manifest, None, *settings)
    assert every.title == f"3 scans of `{manifest}` (1 train, 1 tune, 1 validation)"
    assert capsys.readouterr().err.splitlines() == [
        f"{manifest}: scoring scans: {counts}"
        for counts in ("1 validation", "1 train, 1 tune, 1 validation")
    ]
    other = next(n for n in map("p{}".format, range(99)) if split_of("liver", n) == "validation")
    manifest.write_text("\n".join([*lines, lines[1].replace("one,", f"{other},", 1)]))
    scans = score_scans.VolumeEvaluation(manifest, "validation", *settings, data_set="liver")
    assert other in [case.case_id for case in scans.cases]
