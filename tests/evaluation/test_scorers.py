"""Checkpoints that have seen what they score are refused; folds are pooled."""

import csv

import pytest
import SimpleITK as sitk

from medsam_jax.data.manifest import DATA_SET, case_hash, image_hash, short_hash
from medsam_jax.data.splits import split_of
from medsam_jax.errors import UserError
from medsam_jax.evaluation import run, score_scans, scorers
from medsam_jax.evaluation.protocol import Protocol
from tests.evaluation.fakes import BrightInBox
from tests.evaluation.scans import write, write_manifest


@pytest.fixture
def trained(monkeypatch):
    """Sets what each checkpoint (a threshold) has seen; returns that table."""
    seen = {}
    monkeypatch.setattr(scorers, "resolve", float)
    monkeypatch.setattr(scorers, "read_config", lambda threshold: BrightInBox(threshold).config)
    monkeypatch.setattr(scorers, "read_metadata", lambda threshold: seen.get(threshold, {}))
    return seen


def ids(*names):
    return [case_hash(DATA_SET, name) for name in names]


def add_cases(manifest, *names):
    """Adds rows that show the scan of case "two"; no row names a split."""
    rows = [line.split(",") for line in manifest.read_text().splitlines()[1:]]
    write_manifest(manifest, rows + [[name, *rows[1][1:]] for name in names])


def test_patients_of_the_training_are_scored_only_if_asked_for(manifest, trained, capsys):
    cases = {"train": ids("one"), "tune": ids("elsewhere")}
    trained[0.5] = {"training": {"cases": cases}}
    output = manifest.parent / "out"
    with pytest.raises(UserError) as refused:
        run.evaluate(["0.5", "0.25"], output, manifest=str(manifest))
    assert str(refused.value) == (
        "of 2 patients to score, 1 were trained or tuned on: 0.5 has 1 in train; score other "
        "patients, or --include_trained to score them all the same"
    )
    assert not output.exists(), "refused before the work"
    run.evaluate(["0.5", "0.25"], output, manifest=str(manifest), include_trained=True)
    note = "of 2 patients scored, its training had 1 in train"
    assert [line for line in capsys.readouterr().out.splitlines() if "note" in line] == [
        f"note: 0.5: {note}"
    ]
    text = (output / "summary.md").read_text()
    assert text.count(note) == 1
    assert "| trained on |" in text
    assert f"2 scans of `{manifest}` (2 train)" in text
    with (output / "per_object.csv").open() as file:
        marks = {(r["checkpoint"], r["case_id"]): r["trained_on"] for r in csv.DictReader(file)}
    expected = {(name, case): "" for name in ("0.5", "0.25") for case in ("one", "two")}
    assert marks == expected | {("0.5", "one"): "train"}
    run.evaluate(["0.5"], output, manifest=str(manifest), name="liver")
    assert "note" not in capsys.readouterr().out, "another data set's case of that name"


def test_a_manifest_that_is_partly_known_names_the_split_that_is_not(manifest, trained):
    """Splits by the hash: the remedy that the line names works."""
    new = [n for n in map("p{}".format, range(99)) if split_of(DATA_SET, n) == "validation"][:2]
    add_cases(manifest, *new)
    trained[0.5] = {"training": {"cases": {"train": ids("one"), "tune": ids("two")}}}
    output = manifest.parent / "out"
    with pytest.raises(UserError, match="of 4 patients to score, 2 were trained") as refused:
        run.evaluate(["0.5"], output, manifest=str(manifest))
    assert "0.5 has 1 in train and 1 in tune; give --split validation (2 patients" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)
    run.evaluate(["0.5"], output, manifest=str(manifest), split="validation")
    assert "trained on" not in (output / "summary.md").read_text()
    run.evaluate(["0.5"], output, manifest=str(manifest), split="train")
    assert "its training had 1 in train" in (output / "summary.md").read_text()
    trained[0.5]["training"]["cases"]["train"] += ids(new[0])
    with pytest.raises(UserError, match="of 2 patients to score, 1 were .*; score other patients"):
        run.evaluate(["0.5"], output, manifest=str(manifest), split="validation")


def test_a_renamed_patient_is_known_by_the_image(manifest, trained):
    scan = sitk.GetArrayFromImage(sitk.ReadImage(str(manifest.parent / "one.nii.gz")))
    images = {"train": [], "tune": [short_hash(image_hash(scan))]}
    trained[0.5] = {"training": {"cases": {"train": ids("p7"), "tune": []}, "images": images}}
    text = manifest.read_text()
    manifest.write_text(text.replace("one,", "anonymous,", 1))
    write(manifest.parent / "copy.nii.gz", scan)  # another file of the same values
    manifest.write_text(manifest.read_text().replace("one.nii.gz", "copy.nii.gz"))
    with pytest.raises(UserError, match="of 2 patients to score, 1 were .* 0.5 has 1 in tune"):
        run.evaluate(["0.5"], manifest.parent / "out", manifest=str(manifest))


def fold_model(fold, held_out, train=()):
    seen = {"cases": {"train": ids(*train), "tune": []}, "held_out": ids(*held_out)}
    return {"training": {"config": {"fold": fold}} | seen}


def test_folds_pool_what_each_model_has_held_out(manifest, trained):
    """Models 0.51 and 0.52 score a patient each; 0.3 scores both."""
    trained[0.51] = fold_model("1/2", ["two"], ["one"])
    trained[0.52] = fold_model("2/2", ["one"], ["two"])
    output = manifest.parent / "out"
    run.evaluate(["0.5{}", "0.3"], output, manifest=str(manifest), folds=2)
    with (output / "per_object.csv").open() as file:
        rows = list(csv.DictReader(file))
    pooled = [row for row in rows if row["checkpoint"] == "0.5{}"]
    assert {row["case_id"] for row in pooled} == {"one", "two"}
    assert len(pooled) == len([row for row in rows if row["checkpoint"] == "0.3"]) == 4
    assert {row["trained_on"] for row in rows} == {""}
    scans = score_scans.VolumeEvaluation(manifest, None, [Protocol()], 2.0, 4, output)
    for model, patient in (("0.51", "two"), ("0.52", "one")):
        alone = [row.scores["dice"] for row in scans.evaluate(model) if row.case_id == patient]
        dice = [float(row["dice"]) for row in pooled if row["case_id"] == patient]
        assert dice == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(
    ("models", "folds", "message"),
    [
        ({0.51: ("1/2", ["one"]), 0.52: ("2/2", ["one", "two"])}, 2, "1 of 2 .* several folds"),
        ({0.51: ("1/2", ["one"]), 0.52: ("2/2", [])}, 2, "1 of 2 .* no fold of 0.5{} .two."),
        ({0.51: ("1/2", ["one"]), 0.52: ("1/2", ["two"])}, 2, "fold 1/2, 2/2 is needed"),
        ({0.51: ("1/2", ["one"])}, 2, "0.52: was trained in fold none, 2/2 is needed"),
        ({0.51: ("1/2", ["one"], ["one"]), 0.52: ("2/2", ["two"])}, 2, "0.51 has 1 in train"),
        ({}, 1, "--folds: 1 given"),
        ({}, 0, "0.5{} has {}; give --folds"),
    ],
)
def test_folds_that_do_not_hold_out_every_patient_once(manifest, trained, models, folds, message):
    trained.update({name: fold_model(*model) for name, model in models.items()})
    with pytest.raises(UserError, match=message):
        run.evaluate(["0.5{}"], manifest.parent / "out", manifest=str(manifest), folds=folds)
