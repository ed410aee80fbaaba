"""Summaries and tests on numbers worked out by hand or by SciPy."""

import numpy as np
import pytest
from scipy import stats

from medsam_jax.evaluation import statistics
from medsam_jax.evaluation.base import ObjectScore
from medsam_jax.evaluation.statistics import agreement, intraclass_correlation
from medsam_jax.metrics import METRICS


def row(checkpoint, case, dice, task="t", truth=10, predicted=10, number=0, **changes):
    fields = {"modality": "CT", "slice_index": number, "label": 1, "reference": "mask"}
    fields |= {"prompt": "box", "box_shift": 0, "unit": "mm"}
    fields |= {"truth_size": truth, "predicted_size": predicted}
    fields |= {"scores": dict.fromkeys(METRICS, dice)} | changes
    return ObjectScore(checkpoint=checkpoint, case_id=case, task=task, **fields)


def test_summary_counts_what_it_leaves_out():
    rows = [
        row("m", "a", 0.2),
        row("m", "a", 0.4, number=1),
        row("m", "b", 0.6),
        row("m", "b", np.nan, truth=0, predicted=0, number=1),
        row("m", "c", 0.0, predicted=0),
        row("m", "d", 0.0, truth=0),
    ]
    (summary,) = statistics.summarise(rows)
    assert (summary["n"], summary["cases"]) == (6, 4)
    assert (summary["both_empty"], summary["missed"], summary["spurious"]) == (1, 1, 1)
    assert summary["dice_mean"] == pytest.approx(1.2 / 5)
    assert (summary["dice_q1"], summary["dice_median"], summary["dice_q3"]) == (0, 0.2, 0.4)


def test_summary_has_a_row_over_all_tasks():
    rows = [row("m", "a", 0.2, "t"), row("m", "b", 0.4, "u"), row("n", "a", 1.0, "t")]
    summary = statistics.summarise(rows)
    assert [(r["checkpoint"], r["task"]) for r in summary] == [
        *(("m", "t"), ("m", "u"), ("m", "all")),
        ("n", "t"),
    ]
    assert summary[2]["dice_mean"] == pytest.approx(0.3)


def test_distances_in_mm_and_in_pixels_are_not_averaged():
    rows = [row("m", "a", 0.2, "t"), row("m", "b", 0.4, "u", unit="px")]
    mm, px, both = statistics.summarise(rows)
    assert (mm["unit"], px["unit"], both["unit"]) == ("mm", "px", "mm or px")
    assert (mm["hd95_median"], px["asd_mean"]) == (0.2, 0.4)
    assert np.isnan([both["hd95_median"], both["asd_mean"]]).all()
    assert both["nsd_mean"] == pytest.approx(0.3)


def test_holm_of_a_worked_example():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_signed_rank_equals_scipy():
    rng = np.random.default_rng(0)
    difference = rng.normal(0.3, 1, 20)
    assert statistics.signed_rank(difference) == stats.wilcoxon(difference, method="exact").pvalue
    assert statistics.signed_rank(np.zeros(5)) == 1.0
    # Five differences of one sign: 2 / 2 ** 5.
    assert statistics.signed_rank(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(1 / 16)


def test_the_smallest_p_of_a_number_of_cases():
    for cases in (1, 2, 5, 9):
        assert statistics.smallest_p(cases) == pytest.approx(
            statistics.signed_rank(np.linspace(0.1, 0.2, cases))
        )
    rows = [row(name, f"c{n}", 0.5 + 0.01 * n * (name == "b")) for n in (1, 2) for name in "ab"]
    assert {test["p_smallest"] for test in statistics.compare(rows)} == {0.5}


def test_bootstrap_interval_is_that_of_scipy_over_patients():
    values = np.random.default_rng(1).normal(0.8, 0.1, 15)
    found = statistics.bootstrap_median(values, np.arange(15))
    settings = {"method": "percentile", "n_resamples": 2000, "rng": np.random.default_rng(0)}
    expected = stats.bootstrap((values,), np.median, **settings).confidence_interval
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert found == statistics.bootstrap_median(values, np.arange(15)), "a fixed seed"


def test_bootstrap_draws_patients_with_all_their_objects():
    """Two patients: a resample holds one of them twice (p 1/4 each), or both (1/2)."""
    values, patients = np.array([0.1, 0.2, 0.3, 0.9]), np.array(["a", "a", "a", "b"])
    assert statistics.bootstrap_median(values, patients) == (0.2, 0.9)
    assert np.isnan(statistics.bootstrap_median(values[:3], patients[:3])).all()
    # Ten objects of each of two patients tell no more than two patients do.
    many = statistics.bootstrap_median(values.repeat(10), patients.repeat(10))
    assert many == (0.2, 0.9)


def test_summary_counts_patients_that_were_trained_on():
    rows = [row("m", "a", 0.2, trained_on="train"), row("m", "a", 0.4, trained_on="train")]
    (summary,) = statistics.summarise([*rows, row("m", "b", 0.6)])
    assert summary["trained_on"] == 1
    assert (summary["dice_median_low"], summary["dice_median_high"]) == (pytest.approx(0.3), 0.6)


def test_comparison_pairs_cases_not_slices():
    rows = []
    for case in range(6):
        for number in range(3):
            rows += [
                row("m", f"c{case}", 0.5, number=number),
                row("n", f"c{case}", 0.5 + 0.01 * (case + 1) * (number + 1), number=number),
            ]
    tests = statistics.compare(rows)
    dice = next(test for test in tests if test["metric"] == "dice")
    assert dice["cases"] == 6
    assert dice["median_b_minus_a"] == pytest.approx(0.07)
    assert dice["p"] == pytest.approx(2 / 2**6)
    assert dice["p_holm"] == pytest.approx(2 * 2 / 2**6)


def test_a_patient_with_two_modalities_is_one_pair_over_all():
    """12 patients with CT and MR are 12 pairs of the mean over their cases, not 24."""
    rows = []
    for number in range(12):
        for modality, gain in (("CT", 0.01), ("MR", 0.03)):
            case = {"case": f"p{number}", "modality": modality}
            rows += [row("m", dice=0.5, **case), row("n", dice=0.5 + gain * (number + 1), **case)]
    tests = [test for test in statistics.compare(rows) if test["metric"] == "dice"]
    assert [(test["modality"], test["cases"]) for test in tests] == [
        *(("CT", 12), ("MR", 12), ("all", 12))
    ]
    assert tests[2]["median_b_minus_a"] == pytest.approx(0.02 * 6.5)
    assert tests[2]["p"] == pytest.approx(2 / 2**12)


def test_a_case_without_a_score_leaves_the_pair_to_the_others():
    """A has no score of the MR: the patient's pair is that of the CT alone."""
    rows = [row("m", "a", 0.5), row("n", "a", 0.7), row("m", "a", np.nan, modality="MR")]
    tests = statistics.compare([*rows, row("n", "a", 0.1, modality="MR")])
    pooled = next(t for t in tests if (t["metric"], t["modality"]) == ("dice", "all"))
    assert (pooled["cases"], pooled["median_b_minus_a"]) == (1, pytest.approx(0.2))


def test_agreement_of_a_worked_example():
    truth, measured = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.5, 2.0, 3.5, 4.0])
    result = agreement(measured, truth)
    assert (result["n"], result["bias"]) == (4, 0.25)
    assert result["sd"] == pytest.approx(np.sqrt(1 / 12))
    assert result["upper_limit"] == pytest.approx(0.25 + 1.96 * np.sqrt(1 / 12))
    assert result["spearman"] == pytest.approx(1)
    assert result["pearson"] == pytest.approx(np.corrcoef(measured, truth)[0, 1])


def test_icc_of_shrout_and_fleiss():
    """Table 2 of Shrout and Fleiss (1979): six targets, four judges, ICC(2,1) = 0.29."""
    ratings = np.array(
        [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    )
    assert intraclass_correlation(ratings) == pytest.approx(0.29, abs=0.005)


def test_agreement_needs_variation():
    result = agreement(np.array([1.0]), np.array([2.0]))
    assert result["bias"] == -1
    assert np.isnan([result["pearson"], result["icc"], result["sd"]]).all()
