"""The results page: which rows are scored, and what the cells hold."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medsam_jax.data.manifest import REQUIRED, read_cases
from medsam_jax.errors import UserError
from medsam_jax.evaluation.tables import write_csv
from scripts import results

ROOT = Path(__file__).parents[2]


def row(checkpoint, task, dice, case="a"):
    fields = {"checkpoint": checkpoint, "task": task, "modality": "CT", "case_id": case}
    return fields | {"dice": str(dice), "nsd": str(dice / 2)}


def test_manifests_are_merged_by_split_and_task(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [
        ("a", "a.nii", "m.nii", "CT", "liver", "train"),
        ("b", "b.nii", "m.nii", "CT", "liver", "validation"),
        ("c", "c.nii", "m.nii", "CT", "organs", "validation"),
    ]
    names = (*REQUIRED, "split")
    write_csv(tmp_path / "in" / "x.csv", [dict(zip(names, one, strict=True)) for one in rows])
    given = [tmp_path / "in" / "x.csv"]
    results.merge_manifests(given, tmp_path / "out.csv", "validation", ["organs"])
    (one,) = results.read_csv(tmp_path / "out.csv")
    assert (one["case_id"], one["image"]) == ("b", str(tmp_path / "in" / "b.nii"))
    with pytest.raises(UserError, match="no row of split tune"):
        results.merge_manifests(given, tmp_path / "out.csv", "tune", [])


def test_merged_manifests_keep_windows_and_annotators(tmp_path):
    """One manifest has both columns, one has neither; a reader may lack a case."""
    one = ("a", "a.nii", "m.nii", "CT", "liver"), ("b", "b.nii", "m.nii", "CT", "liver")
    names = (*REQUIRED, "window", "mask_reader")
    rows = [(*one[0], "lung", "r.nii"), (*one[1], "", "")]
    write_csv(tmp_path / "x.csv", [dict(zip(names, row, strict=True)) for row in rows])
    other = ("c", "c.nii", "m.nii", "MR", "liver")
    write_csv(tmp_path / "y.csv", [dict(zip(REQUIRED, other, strict=True))])
    for name in ("a.nii", "b.nii", "c.nii", "m.nii", "r.nii"):
        (tmp_path / name).touch()
    merged = tmp_path / "out" / "merged.csv"
    results.merge_manifests([tmp_path / "x.csv", tmp_path / "y.csv"], merged, None, [])
    cases = read_cases(merged)
    assert [case.window for case in cases] == ["lung", None, None]
    first, reader = str(tmp_path / "m.nii"), str(tmp_path / "r.nii")
    assert [case.masks for case in cases] == [
        *({"mask": first, "reader": reader}, {"mask": first}, {"mask": first})
    ]


def test_tables_hold_scores_against_the_first_annotator():
    rows = [row("m", "t", 0.5) | {"reference": name} for name in ("mask", "reader")]
    assert results.against_first(rows) == rows[:1]


def test_cells():
    rows = [row("m", "t", x) for x in (0.2, 0.4, 0.9)] + [row("m", "t", np.nan)]
    assert results.cell(rows, ["m"], "dice") == "0.400 (0.300-0.650)<br>0.500"
    rows += [row("n", "t", x) for x in (0.6, 0.8, 1.0)]
    assert results.cell(rows, ["m", "n"], "dice") == (
        "0.600 [0.400, 0.800]<br>0.650 [0.500, 0.800]"
    )


def test_tables_have_a_column_for_each_model():
    rows = [row("m", "t", 0.5), row("n", "t", 0.7), row("m", "u", 0.1), row("n", "u", 0.2)]
    rows += [row(name, "t", 0.5, "b") for name in "mn"]
    scores = {"internal": {"per_object.csv": rows, "per_slice.csv": rows}}
    text = results.tables(scores, {"first": ["m"], "second": ["n"]}, "the command")
    assert "```\nthe command\n```" in text
    assert text.count("| data | task | cases |") == len(results.TABLES)
    line = (
        "| internal | t, CT | 2 | 2 | 0.500 (0.500-0.500)<br>0.500 | 0.600 (0.550-0.650)<br>0.600 |"
    )
    assert line in text


@pytest.mark.parametrize("given", [["a"], ["=x"], ["a=x", "a=y"]])
def test_models_that_cannot_be_meant(given):
    with pytest.raises(UserError, match="--model"):
        results.parse_models(given)


def test_models_are_named():
    given = results.parse_models(["a b=x", "c=y+z"])
    assert given == {"a b": ["x"], "c": ["y", "z"]}


def test_overlaps_of_no_mask_with_objects():
    """In a process of its own, since scripts share the names of their flags."""
    code = """if True:
        import numpy as np
        from scripts.automatic_masks_table import overlaps
        objects = np.zeros((2, 4, 5), bool)
        objects[0, :2] = objects[1, 2:] = True
        assert overlaps(np.zeros((0, 4, 5), bool), objects).shape == (0, 2)
        np.testing.assert_array_equal(overlaps(objects[:1], objects), [[1, 0]])
        """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_a_page_the_tables_go_to_the_output(tmp_path):
    """docs/results.md is written where `--page` names it, and only there."""
    page = (ROOT / "docs/results.md").read_bytes()
    command = [sys.executable, "scripts/results.py", "--model", "a=none", f"--output={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.startswith(results.BEGIN)
    assert "| a | `none` |" in text
    assert (ROOT / "docs/results.md").read_bytes() == page


@pytest.mark.parametrize("script", ["parity_table", "automatic_masks_table"])
def test_scripts_write_into_docs_only_where_they_are_told(script):
    """In a process of its own, since scripts share the names of their flags."""
    code = f"from scripts import {script}; print({script}._OUTPUT.default)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert done.stdout == b"None\n"
