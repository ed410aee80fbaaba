"""Rows of a manifest: spaces of a spreadsheet, labels that are no objects or are not there."""

import pytest

from medsam_jax.errors import UserError
from tests.evaluation.scans import write_manifest
from tests.evaluation.test_score_scans import evaluation


def test_labels_that_a_row_ignores_are_not_scored(manifest):
    rows = [line.split(",") for line in manifest.read_text().splitlines()[1:]]
    rows = [[*row, ignored] for row, ignored in zip(rows, ("3", ""), strict=True)]
    path = write_manifest(manifest.parent / "ignore.csv", rows, ("ignore",))
    scored = [(row.case_id, row.label) for row in evaluation(path).evaluate("0")]
    assert scored == [("one", 1), ("two", 1), ("two", 3)]


def test_rows_of_a_spreadsheet_are_scored_as_those_of_a_plain_file(manifest):
    """CT with a space beside it is CT."""
    text = manifest.read_text()
    spaced = text.replace(",", " , ")
    (manifest.parent / "spaced.csv").write_text(f"\ufeff{spaced}, , , , \n", encoding="utf-8")
    found = evaluation(manifest.parent / "spaced.csv").evaluate("0")
    assert found == evaluation(manifest).evaluate("0")


def test_label_that_a_case_lacks_is_refused_by_name(manifest):
    with pytest.raises(UserError, match=r"case one \(balls, CT\): --labels 2 is not in .*\[1, 3\]"):
        evaluation(manifest, labels=[1, 2]).evaluate("0.5")
