import json

import pytest

from benchmarks import report
from benchmarks.harness import Contender, Measurement, Row
from medsam_jax.errors import UserError

LIMITS = {"operations": 1e11, "operations_bf16": 2e11, "bytes": 1e10}


def entry(name="a row", suite="cpu", seconds=(0.1, 0.2, 0.3), items=1, **fields):
    row = Row(
        name,
        suite,
        (Contender("ours", ""), Contender("theirs", "")),
        targets={"theirs": 0.5},
        memory_targets={"theirs": 1.0},
        **fields,
    )
    rest = {"environment": {}, "versions": {"numpy": "2"}}
    ours = Measurement("ours", list(seconds), 2.0, 10**8, 0.0, 4e9, 1e9, items, **rest)
    rest = {"environment": {"SETTING": "1"}, "versions": {"torch": "3"}}
    theirs = Measurement("theirs", [0.5, 0.4, 0.3], 1.0, 2 * 10**8, 1e-6, None, None, 1, **rest)
    machine = {"processor": "a processor", "load before": "0.1"}
    return report.entry(row, [ours, theirs], machine, LIMITS, "a command")


def cells(text, contender):
    (line,) = [line for line in text.splitlines() if f"| {contender} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_states_ratio_target_memory_and_limit():
    text = report.markdown([entry()])
    theirs = dict(zip(report.COLUMNS, cells(text, "theirs"), strict=True))
    assert theirs["seconds"] == "0.4 (0.35 to 0.45)"
    assert theirs["ratio"] == "0.50 (0.35 to 0.75)"
    assert theirs["target"] == "0.50 met"
    assert theirs["memory ratio"] == "0.50, target 1.00 met"
    ours = dict(zip(report.COLUMNS, cells(text, "ours"), strict=True))
    assert ours["limit, s"] == "0.1"  # 1 GB at 10 GB/s takes longer than 4 GFLOP at 100 GFLOP/s
    assert ours["of limit"] == "50%"
    assert "theirs: `SETTING=1`" in text
    assert "numpy 2, torch 3" in text


def test_limit_is_of_the_row_s_precision():
    found = entry(precision="bfloat16")
    found["contenders"][0]["bytes"] = None
    ours = dict(zip(report.COLUMNS, cells(report.markdown([found]), "ours"), strict=True))
    assert ours["limit, s"] == "0.02"


def test_a_missed_target_stays():
    text = report.markdown([entry(), entry("slow", seconds=(0.6, 0.6, 0.6))])
    assert "0.50 **missed**" in text
    assert "3 of 4 targets are met." in text
    assert "* missed: slow, time against theirs: 1.50, target 0.50" in text


def test_ratio_is_of_the_time_of_an_item():
    middle, low, high = report.ratio(*entry(items=4)["contenders"])
    assert (middle, low, high) == pytest.approx((0.125, 0.0875, 0.1875))


def test_pieces_of_a_suite_add_up(tmp_path):
    path = tmp_path / "docs" / "performance.json"
    order = ["first", "second", "third"]
    report.merge(path, [entry("third"), entry("first", "gpu")], order)
    report.merge(path, [entry("first"), entry("third", seconds=(0.5, 0.5, 0.5))], order)
    rows = json.loads(path.read_text())["rows"]
    names = [(row["suite"], row["name"]) for row in rows]
    assert names == [("cpu", "first"), ("cpu", "third"), ("gpu", "first")]
    assert rows[1]["contenders"][0]["median"] == 0.5


def test_only_what_is_between_the_marks_is_replaced(tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(document, [entry()])
    report.update(document, [entry("another row")])
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| a row |" not in text
    assert text.count("| another row |") == 2
    document.write_text("no marks")
    with pytest.raises(UserError, match="needs one line"):
        report.update(document, [entry()])
