"""Tables that read back, and figures that show what they say."""

import csv

import numpy as np
import pytest

from medsam_jax.evaluation import burden_report, plots, tables
from medsam_jax.evaluation.base import ObjectScore
from medsam_jax.metrics import METRICS


def test_csv_reads_back(tmp_path):
    rows = [{"name": "a,b", "x": 0.123456789, "n": 3}, {"name": "c", "x": float("nan"), "n": 4}]
    tables.write_csv(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read[0] == {"name": "a,b", "x": "0.123457", "n": "3"}
    assert np.isnan(float(read[1]["x"]))
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_latex_escapes_names_and_breaks_before_brackets():
    headings = ["task", "modality", "checkpoint", "n", "NSD (2 mm) median (IQR)"]
    row = ["x_y", "50%", r"runs/a~1\b", "1", "0.743 (0.681-0.777)"]
    text = tables.latex(headings, [row], "A & B of `2024-11`")
    stacked = r"\begin{tabular}{@{}c@{}}%s\end{tabular}"
    assert r"x\_y & 50\% & runs/a\textasciitilde{}1\textbackslash{}b & 1 & " in text
    assert stacked % r"0.743\\(0.681--0.777)" in text
    assert stacked % r"NSD (2 mm) median\\(IQR)" in text
    assert r"\caption{A \& B of 2024-11}" in text
    assert "{lllrr}" in text
    assert text.count("{") == text.count("}")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3


def test_markdown_keeps_a_bar_in_its_cell():
    assert tables.markdown(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"


def summary(task, unit, **changes):
    empty = {"missed": 0, "spurious": 0, "both_empty": 0}
    kinds = ("median", "q1", "q3", "mean", "median_low", "median_high")
    numbers = {f"{m}_{kind}": 0.5 for m in METRICS for kind in kinds}
    names = {"task": task, "modality": "CT", "checkpoint": "m", "reference": "mask"}
    counts = {"cases": 1, "trained_on": 0, "n": 2}
    return names | {"unit": unit} | counts | empty | numbers | changes


def test_summary_table_names_the_unit_of_what_it_holds():
    headings, ((*_, hd95, _),) = tables.summary_table([summary("t", "px")], 2.0)
    assert headings[-2:] == ["HD95 (px) median (IQR)", "ASD (px) median (IQR)"]
    assert "NSD (2 px) median (IQR)" in headings
    assert hd95 == "0.50 (0.50-0.50)"
    headings, cells = tables.summary_table([summary("t", "px"), summary("u", "mm")], 2.0)
    assert headings[-2] == "HD95 (mm or px) median (IQR)"
    assert [row[-2] for row in cells] == ["0.50 px (0.50-0.50)", "0.50 mm (0.50-0.50)"]


def test_summary_table_of_missed_objects_has_dashes_and_counts():
    unknown = {f"hd95_{name}": np.nan for name in ("median", "q1", "q3", "mean")}
    row = summary("t", "mm", missed=2, both_empty=1, **unknown)
    headings, (cells,) = tables.summary_table([row], 2.0)
    named = dict(zip(headings, cells, strict=True))
    assert named["HD95 (mm) median (IQR)"] == "-"
    assert named["empty (missed/spurious/both)"] == "2/0/1"
    assert "reference" not in headings
    headings, _ = tables.summary_table([row, row | {"reference": "reader"}], 2.0)
    assert headings[3] == "reference"


def test_summary_table_shows_intervals_and_what_was_trained_on():
    row = summary("t", "mm", dice_median_low=0.25, trained_on=1, nsd_median_low=np.nan)
    headings, (cells,) = tables.summary_table([row], 2.0)
    assert cells[headings.index("trained on")] == "1"
    dice, nsd = (i for i, heading in enumerate(headings) if heading == "95 % interval")
    assert (cells[dice], cells[nsd]) == ("0.250 to 0.500", "-")
    assert "trained on" not in tables.summary_table([summary("t", "mm")], 2.0)[0]


def score(checkpoint, modality, dice, **changes):
    fields = {"task": "t", "case_id": "a", "slice_index": 0, "label": 1, "reference": "mask"}
    fields |= {"prompt": "box", "box_shift": 0, "unit": "mm", "truth_size": 9, "predicted_size": 9}
    fields |= {"scores": dict.fromkeys(METRICS, dice)} | changes
    return ObjectScore(checkpoint=checkpoint, modality=modality, **fields)


def test_scatter_pairs_an_object_with_itself():
    """One case of one task in two modalities: two objects."""
    rows = [score("m", "CT", 0.9), score("m", "MR", 0.5), score("n", "CT", 0.8)]
    figure = plots.paired_scatter([*rows, score("n", "MR", 0.4)], "dice", "m", "n")
    x, y = figure.axes[0].lines[0].get_data()
    assert sorted(zip(x, y, strict=True)) == [(0.5, 0.4), (0.9, 0.8)]


def test_box_shift_figure_has_a_line_for_annotators():
    rows = [score("m", "CT", 0.9 - shift / 100, box_shift=shift) for shift in (0, 10)]
    figure = plots.score_by_shift([*rows, score("annotator", "CT", 0.7, box_shift=0)])
    curve, line = (line.get_ydata() for line in figure.axes[0].lines)
    assert (list(curve), list(line)) == ([0.9, 0.8], [0.7, 0.7])


def test_burden_section_counts_what_is_not_measured():
    rows = [score(name, "CT", 1, burden={"truth_volume_ml": np.nan}) for name in ("m", "n")]
    text = burden_report.section(rows, [])
    assert "mm: 1 objects" in text
    assert "|" not in text


def burden_row(task, case, truth, predicted, modality="CT", **changes):
    sides = {name: truth if name.startswith("truth") else predicted for name in burden_report.NAMES}
    return score("m", modality, 1, task=task, case_id=case, burden=sides, **changes)


def test_burden_is_summed_per_patient_and_pooled_over_tasks():
    rows = [burden_row("t", "a", 2.0, 3.0), burden_row("t", "a", 4.0, 4.0, label=2)]
    measured, table = burden_report.agreements([*rows, burden_row("u", "b", 1.0, 3.0)])
    patients = {row["case_id"]: row for row in measured if row["level"] == "patient"}
    assert (patients["a"]["truth_volume_ml"], patients["a"]["predicted_volume_ml"]) == (6, 7)
    bias = {(r["level"], r["task"]): r["bias"] for r in table if r["measure"] == "volume_ml"}
    assert bias == {
        **{("object", "t"): 0.5, ("object", "u"): 2, ("object", "all"): 1},
        **{("patient", "t"): 1, ("patient", "u"): 2, ("patient", "all"): 1.5},
    }
    cells = burden_report.section(rows, table).splitlines()
    assert [line.split(" | ")[-2:] for line in cells if "object | u" in line][0] == ["+2.00", "- |"]


def test_a_patient_with_two_modalities_counts_once_in_the_burden_over_all():
    """Two tasks of a modality are summed; two modalities show the same lesions: averaged."""
    rows = [burden_row("t", "a", 2.0, 3.0), burden_row("u", "a", 1.0, 1.0)]
    rows += [burden_row("t", "a", 4.0, 7.0, "MR"), burden_row("t", "b", 5.0, 5.0)]
    measured, table = burden_report.agreements(rows)
    (pooled,) = (
        row
        for row in table
        if (row["level"], row["task"], row["measure"]) == ("patient", "all", "volume_ml")
    )
    assert pooled["n"] == 2
    assert pooled["bias"] == ((4 + 7) / 2 - (3 + 4) / 2 + 0) / 2
    patients = [row for row in measured if row["level"] == "patient"]
    assert len(patients) == 4, "a patient has a row in each task and modality"


def test_bland_altman_figure_tells_tasks_apart(monkeypatch, tmp_path):
    saved = []

    def keep(folder, figures):
        saved.extend(draw() for draw in figures.values())
        return list(figures)

    monkeypatch.setattr(burden_report, "save_figures", keep)
    rows = [burden_row("t", "a", 2.0, 3.0), burden_row("u", "b", 1.0, 3.0)]
    burden_report.write_figures(tmp_path, burden_report.agreements(rows)[0])
    volume = saved[0].axes[0]
    dots = {line.get_label(): line.get_xydata().tolist() for line in volume.lines[:2]}
    assert dots == {"t, CT": [[2.5, 1.0]], "u, CT": [[2.0, 2.0]]}
    levels = [line.get_ydata()[0] for line in volume.lines[2:]]
    limit = 1.96 * np.sqrt(0.5)  # differences of 1 and 2
    assert levels == pytest.approx([1.5, 1.5 - limit, 1.5 + limit])


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_picture_grid_has_no_empty_panel(count, panels):
    rows = [score("m", "CT", place / 10, case_id=str(place)) for place in range(count)]
    figure = plots.picture_grid(rows, lambda row: np.zeros((4, 4, 3), np.uint8))
    titles = [axes.get_title().partition(":")[0] for axes in figure.axes]
    assert all(axes.get_visible() for axes in figure.axes)
    assert titles == {1: ["best"], 2: ["best", "worst"]}.get(panels, ["best", "median", "worst"])
    assert [axes.get_xlabel().partition(",")[0] for axes in figure.axes] == {
        1: ["0"],
        2: ["1", "0"],
        3: ["2", "1", "0"],
        9: ["8", "4", "0"],
    }[count]
