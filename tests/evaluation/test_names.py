"""Names that a reader gives: of checkpoints, and of labels, in tables and figures."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from medsam_jax.data.datasets import RECORD_FILE, label_name
from medsam_jax.errors import UserError
from medsam_jax.evaluation import base, plots, run, score_slices, scorers, statistics
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.evaluation.scorers import by_display_name
from tests.evaluation.fakes import BrightInBox, discs, fake_dataset
from tests.evaluation.test_score_scans import evaluation

NAMES = {"1": {"original": 1, "name": "liver"}, "3": {"original": 3, "name": "tumour"}}


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setattr(scorers, "resolve", float)
    monkeypatch.setattr(scorers, "read_config", lambda threshold: BrightInBox(threshold).config)
    monkeypatch.setattr(scorers, "read_metadata", lambda threshold: {})


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_display_names_stand_in_every_table(manifest, tmp_path):
    run.evaluate(["Tuned=0.5", "0.25"], tmp_path / "out", manifest=str(manifest))
    for table in ("per_object.csv", "summary.csv", "per_slice.csv"):
        found = {row["checkpoint"] for row in rows_of(tmp_path / "out" / table)}
        assert found == {"Tuned", "0.25"}, table
    tests = rows_of(tmp_path / "out/comparisons.csv")
    assert {(t["checkpoint_a"], t["checkpoint_b"]) for t in tests} == {("Tuned", "0.25")}
    page = (tmp_path / "out/summary.md").read_text()
    assert "* checkpoints: Tuned (`0.5`), `0.25`" in page


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["A=0.5", "A=0.25"], "the name 'A' is given twice"),
        (["A=0.5", "0.5"], "names one twice"),
        (["0.5", "0.5"], "names one twice"),
        (["=0.5"], "give CHECKPOINT or NAME=CHECKPOINT"),
        (["A="], "give CHECKPOINT or NAME=CHECKPOINT"),
    ],
)
def test_names_given_twice_or_empty_are_one_line(items, message):
    with pytest.raises(UserError, match=message) as refused:
        by_display_name(items)
    assert "\n" not in str(refused.value)


def test_paths_with_equals_signs_and_commas_stay_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "a,b", "fold=1", "runs/lr=1,wd=2/best"):
        (tmp_path / name).mkdir(parents=True)
    given = "lr=0.1,a,b,runs/lr=1,wd=2/best,Mine=runs/lr=1,wd=2,fold={},runs/x=1/best,N=lr=0.1/."
    assert by_display_name(given.split(",")) == {
        "lr=0.1": "lr=0.1",
        "a,b": "a,b",
        "runs/lr=1,wd=2/best": "runs/lr=1,wd=2/best",
        "Mine": "runs/lr=1,wd=2",
        "fold={}": "fold={}",
        "runs/x=1/best": "runs/x=1/best",
        "N": "lr=0.1/.",
    }


def test_names_of_labels_come_from_the_flag_or_from_the_data_set_beside_the_manifest(manifest):
    numbers = {row.label: row.label_name for row in evaluation(manifest).evaluate("0.5")}
    assert numbers == {1: "1", 3: "3"}
    record = {"name": "medical_slices", "labels": {"balls": NAMES}}
    (manifest.parent / RECORD_FILE).write_text(json.dumps(record))
    named = {row.label: row.label_name for row in evaluation(manifest).evaluate("0.5")}
    assert named == {1: "liver", 3: "tumour"}
    given = evaluation(manifest, labels=[3], label_names={3: "lesion"}).evaluate("0.5")
    assert {row.label: row.label_name for row in given} == {3: "lesion"}


def test_table_by_label_holds_the_scores_of_each(manifest, tmp_path):
    output, labels = tmp_path / "out", ["1=liver", "3=tumour"]
    run.evaluate(["Tuned=0.5"], output, manifest=str(manifest), labels=labels)
    objects, table = rows_of(output / "per_object.csv"), rows_of(output / "per_label.csv")
    assert [(row["label"], row["modality"]) for row in table] == [
        ("liver", "CT"),
        ("tumour", "CT"),
        ("liver", "MR"),
        ("tumour", "MR"),
    ]
    for row in table:
        scores = [
            float(one["dice"])
            for one in objects
            if (one["label_name"], one["modality"]) == (row["label"], row["modality"])
        ]
        assert float(row["dice_median"]) == pytest.approx(np.median(scores), abs=1e-6)
        assert int(row["n"]) == len(scores) > 0
    page = (output / "summary.md").read_text()
    assert re.search(r"## Scores by label\n\n\| task \| modality \| checkpoint \| label \|", page)
    assert "| balls | CT | Tuned | tumour |" in page


def test_labels_that_tell_nothing_have_no_table(manifest):
    assert statistics.by_label(evaluation(manifest, labels=[1]).evaluate("0.5")) == []


def test_pictures_name_their_labels(manifest):
    rows = evaluation(manifest, labels=[3], label_names={3: "lesion"}).evaluate("0.5")
    figure = plots.picture_grid(rows, lambda row: np.zeros((4, 4, 3), np.uint8))
    shown = [axes.get_xlabel() for axes in figure.axes if axes.get_visible()]
    assert shown
    assert all("label lesion" in text for text in shown)


def test_stored_labels_have_the_name_of_what_they_are_an_instance_of():
    record = {"labels": {"t": {"1": {"original": 9, "name": "lesion"}}}}
    record["labels"]["t"]["above"] = {"instances_of": 1}
    assert [label_name(record, "t", label) for label in (1, 2, 7)] == ["lesion"] * 3
    assert label_name({"labels": {"t": {}}}, "t", 4) == label_name({}, "u", 4) == "4"


def test_data_set_route_names_the_labels_of_its_record(monkeypatch, tmp_path):

    source, info = fake_dataset(discs(), tmp_path)
    task = source[0]["task"].decode()
    labels = {str(n): {"original": n, "name": f"organ {n}"} for n in (1, 2)}
    info = SimpleNamespace(**vars(info) | {"record": info.record | {"labels": {task: labels}}})
    monkeypatch.setattr(score_slices, "open_dataset", lambda data_dir, *args: (source, info))
    monkeypatch.setattr(base, "load_model", lambda name: BrightInBox(float(name)))
    protocols = [Protocol("box", 0)]
    route = score_slices.SplitEvaluation("d", "validation", protocols, 2.0, 2, tmp_path / "out")
    assert {row.label_name for row in route.evaluate("0.5")} == {"organ 1", "organ 2"}
