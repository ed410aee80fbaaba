import numpy as np
import pytest

from benchmarks.harness import Contender, Row, largest_difference, measure
from benchmarks.suites import every_row
from medsam_jax.errors import UserError

SLEEPER = "tests.benchmarks.contenders:sleeper"


def _row(*contenders, **kwargs):
    return Row("a row", "cpu", contenders, **kwargs)


def test_difference_is_a_fraction_of_the_largest_value():
    ours, theirs = [np.array([1.0, 4.0])], [np.array([1.5, 5.0])]
    assert largest_difference(ours, theirs) == pytest.approx(1.0 / 5.0)


def test_difference_of_other_shapes_is_refused():
    with pytest.raises(UserError, match="shapes differ"):
        largest_difference([np.zeros(2)], [np.zeros(3)])


def test_measures_every_contender_in_every_round():
    ours = Contender("ours", SLEEPER, {"seconds": 0.02})
    theirs = Contender("theirs", SLEEPER, {"seconds": 0.08}, {"SETTING": "1"})
    results = measure(_row(ours, theirs), rounds=3, seconds=10, cores=1)
    assert [len(result.seconds) for result in results] == [3, 3]
    # A sleep is never shorter than asked, and seldom much longer.
    assert 0.15 < results[0].median / results[1].median < 0.5
    assert all(result.peak_memory > 10e6 for result in results)
    assert results[1].environment == {"SETTING": "1"}


def test_ends_after_three_rounds_when_the_time_is_up():
    ours = Contender("ours", SLEEPER, {"seconds": 0.05})
    (result,) = measure(_row(ours), rounds=15, seconds=0.1, cores=1)
    assert len(result.seconds) == 3
    (result,) = measure(_row(ours, rounds=2), rounds=15, seconds=0.1, cores=1)
    assert len(result.seconds) == 2


def test_different_outputs_are_not_timed():
    ours = Contender("ours", SLEEPER, {"seconds": 0.0})
    theirs = Contender("theirs", SLEEPER, {"seconds": 0.0, "value": 1.01})
    with pytest.raises(UserError, match="outputs of theirs differ from ours by 5.0e-03"):
        measure(_row(ours, theirs), rounds=1, seconds=1, cores=1)
    variants = measure(_row(ours, theirs, compared=False), rounds=1, seconds=1, cores=1)
    assert [variant.difference for variant in variants] == [None, None]


def test_a_contender_that_dies_is_named_with_its_last_words():
    ours = Contender("ours", "tests.benchmarks.contenders:dies")
    with pytest.raises(UserError, match="ours: its process ended: RuntimeError: no such library"):
        measure(_row(ours), rounds=1, seconds=1, cores=1)


def test_rows_have_names_of_their_own_and_targets_for_their_contenders():
    rows = every_row(points=32)
    assert len({(row.suite, row.name) for row in rows}) == len(rows)
    for row in rows:
        others = {contender.name for contender in row.contenders[1:]}
        assert set(row.targets) | set(row.memory_targets) <= others, row.name
