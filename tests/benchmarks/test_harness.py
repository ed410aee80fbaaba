import json

import numpy as np
import pytest

from benchmarks import lite_medsam, report
from benchmarks.harness import Contender, Row, largest_difference, measure
from medsam_jax.errors import UserError

SLEEPER = "tests.benchmarks.contenders:sleeper"
LIMITS = {"operations": 1e11, "bytes": 1e10}


def _row(*contenders, **kwargs):
    return Row("a row", "cpu", contenders, **kwargs)


def test_difference_is_a_fraction_of_the_largest_value():
    ours, theirs = [np.array([1.0, 4.0])], [np.array([1.5, 5.0])]
    assert largest_difference(ours, theirs) == pytest.approx(1.0 / 5.0)


def test_difference_of_other_shapes_is_refused():
    with pytest.raises(UserError, match="shapes differ"):
        largest_difference([np.zeros(2)], [np.zeros(3)])


def test_measures_rounds_and_ratio_and_writes_both_reports(tmp_path):
    ours = Contender("ours", SLEEPER, {"seconds": 0.02})
    theirs = Contender("theirs", SLEEPER, {"seconds": 0.08}, {"SETTING": "1"})
    row = _row(ours, theirs, targets={"theirs": 0.5})
    results = measure(row, rounds=3, cores=1)

    assert [len(result.seconds) for result in results] == [3, 3]
    middle, low, high = report.ratio(*results)
    assert 0.15 < middle < 0.5  # a sleep is never shorter than asked, and seldom much longer
    assert low <= high
    assert all(result.peak_memory > 10e6 for result in results)

    report.write(tmp_path, [(row, results)], {"processor": "test"}, LIMITS, "a command")
    text = (tmp_path / "results.md").read_text()
    assert "| a row | theirs |" in text
    assert "0.50 met" in text
    assert "| 0.040 |" in text  # 4 GFLOP at 100 GFLOP/s
    assert "theirs: `SETTING=1`" in text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"][0]["contenders"][1]["seconds"] == results[1].seconds


def test_different_outputs_are_not_timed():
    ours = Contender("ours", SLEEPER, {"seconds": 0.0})
    theirs = Contender("theirs", SLEEPER, {"seconds": 0.0, "value": 1.01})
    with pytest.raises(UserError, match="outputs of theirs differ from ours by 5.0e-03"):
        measure(_row(ours, theirs), rounds=1, cores=1)


def test_a_contender_that_dies_is_named_with_its_last_words():
    ours = Contender("ours", "tests.benchmarks.contenders:dies")
    with pytest.raises(UserError, match="ours: its process ended: RuntimeError: no such library"):
        measure(_row(ours), rounds=1, cores=1)


def test_targets_name_contenders_of_their_row():
    for row in lite_medsam.ROWS:
        assert set(row.targets) <= {contender.name for contender in row.contenders[1:]}
    assert len({row.name for row in lite_medsam.ROWS}) == len(lite_medsam.ROWS)
