"""Summaries of scores and the tests that compare checkpoints on the same objects."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Real, Shaped

from medsam_jax.evaluation.base import ObjectScore
from medsam_jax.metrics import METRICS

RESAMPLES, LEVEL = 2000, 0.95  # of the bootstrap intervals

T = TypeVar("T")
Row = dict[str, Any]  # of a table of results
Case = tuple[str, str, str]  # case_id (the patient), task, modality
_GROUP = ("task", "modality", "checkpoint")
ALL = "all"  # stands for every task or modality in a table


def summarise(rows: Sequence[ObjectScore]) -> list[Row]:
    """Returns one row per setting and annotator, task and modality, and one row over all of them.

    NaN (both masks empty) and infinite distances (one empty) are left out of the statistics and
    counted in `both_empty`, `missed` (truth without prediction) and `spurious`. `unit` is that of
    the distances; where mm and pixels meet, distances have no statistics. `trained_on` counts the
    patients that the checkpoint has seen. `median_low` and `median_high` are `bootstrap_median`'s.
    """
    summary = []
    names = ("checkpoint", "prompt", "box_shift", "reference")
    for keys, group in grouped(rows, attrgetter(*names)).items():
        for task, modality, members in _tasks_and_all(group):
            row = dict(zip(names, keys, strict=True))
            row |= {"task": task, "modality": modality, "unit": units(row.unit for row in members)}
            row |= {"cases": count_cases(members)}
            row |= {"trained_on": count_cases(one for one in members if one.trained_on)}
            summary.append(row | {"n": len(members)} | _empty_counts(members) | _spread(members))
    return summary


def by_label(rows: Sequence[ObjectScore]) -> list[Row]:
    """Returns `summarise`'s row of each label of a task and modality, of the main table's objects.

    Empty where labels tell nothing more: a single one in each task and modality, without a name.
    """
    rows = first_setting(rows)
    names = {(row.task, row.modality, row.label_name) for row in rows}
    tasks = {name[:2] for name in names}
    if len(names) == len(tasks) and all(name.isdigit() or not name for *_, name in names):
        return []
    groups = grouped(sorted(rows, key=attrgetter("label")), attrgetter("label_name"))
    found = []
    for label, members in groups.items():
        summary = [row for row in summarise(members) if row["task"] != ALL]
        found += [{"label": label, **row} for row in summary]
    order = {key: place for place, key in enumerate(grouped(rows, attrgetter(*_GROUP)))}
    return sorted(found, key=lambda row: order[itemgetter(*_GROUP)(row)])


def first_setting(rows: Sequence[ObjectScore]) -> list[ObjectScore]:
    """Returns the rows with the first row's box shift and reference: those of the main table."""
    wanted = rows[0].box_shift, rows[0].reference
    return [row for row in rows if (row.box_shift, row.reference) == wanted]


def units(found: Iterable[str]) -> str:
    """Returns the unit of several rows: "mm", "px", or "mm or px" of volumes and pictures."""
    return " or ".join(sorted({unit for one in found for unit in one.split(" or ")}))


def count_cases(rows: Iterable[ObjectScore]) -> int:
    """Counts the different patients."""
    return len({row.case_id for row in rows})


def compare(rows: Sequence[ObjectScore]) -> list[Row]:
    """Tests all pairs of checkpoints by Wilcoxon's signed-rank test, Holm-corrected.

    The pairs are patients, because slices, objects and modalities of one patient are not
    independent: see `patient_differences`. One correction covers all tests of the returned table.
    Only rows of the first shift and reference are compared. `p_smallest` is the smallest p that so
    many cases can give, and the median has the interval of `bootstrap_median`.
    """
    rows = first_setting(rows)
    checkpoints = list(dict.fromkeys(row.checkpoint for row in rows))
    tests = []
    for task, modality, members in _tasks_and_all(rows):
        for metric in (name for name, metric in METRICS.items() if metric.is_main):
            means = {name: case_means(members, name, metric) for name in checkpoints}
            for a, b in itertools.combinations(checkpoints, 2):
                difference = patient_differences(means[a], means[b])
                if not len(difference):
                    continue
                test = {"task": task, "modality": modality, "metric": metric}
                test |= {"checkpoint_a": a, "checkpoint_b": b, "cases": len(difference)}
                test |= {"median_b_minus_a": float(np.median(difference))}
                low, high = bootstrap_median(difference, np.arange(len(difference)))
                test |= {"median_low": low, "median_high": high}
                smallest = smallest_p(len(difference))
                tests.append(test | {"p": signed_rank(difference), "p_smallest": smallest})
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    return tests


def case_means(rows: Iterable[ObjectScore], checkpoint: str, metric: str) -> dict[Case, float]:
    """Returns the mean score of each case over its objects that have a score."""
    scored = [row for row in rows if np.isfinite(row.scores[metric])]
    chosen = [row for row in scored if row.checkpoint == checkpoint]
    cases = grouped(chosen, attrgetter("case_id", "task", "modality"))
    return {name: float(np.mean([row.scores[metric] for row in cases[name]])) for name in cases}


def patient_differences(
    a: Mapping[Case, float], b: Mapping[Case, float]
) -> Float[np.ndarray, " patients"]:
    """Returns B minus A of each patient: the mean over the cases that both have."""
    by_patient = grouped(sorted(a.keys() & b.keys()), itemgetter(0)).values()
    return np.array([np.mean([b[case] - a[case] for case in cases]) for cases in by_patient])


def signed_rank(difference: np.ndarray) -> float:
    """Returns the two-sided p of Wilcoxon's signed-rank test; 1 when nothing differs."""
    from scipy import stats

    if not np.any(difference):
        return 1.0
    # Pratt keeps pairs without a difference in the ranking; the exact distribution allows no ties.
    ties = len(np.unique(np.abs(difference))) < len(difference)
    exact = not ties and np.all(difference) and len(difference) <= 50
    method = "exact" if exact else "approx"
    return float(stats.wilcoxon(difference, zero_method="pratt", method=method).pvalue)


def smallest_p(cases: int) -> float:
    """Returns the smallest p of a two-sided exact signed-rank test, all differences of one sign."""
    return min(1.0, 2.0 ** (1 - cases))


def bootstrap_median(
    values: Float[np.ndarray, " n"], patients: Shaped[np.ndarray, " n"]
) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the median; NaN for fewer than 2 patients.

    Patients are drawn with replacement, each with all its values, `RESAMPLES` times by a fixed
    seed (Efron and Tibshirani 1993, chapter 13): objects of one patient are not independent.
    """
    names, patient = np.unique(patients, return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    order = np.argsort(values, kind="stable")
    ranked, patient = values[order], patient[order]
    rng = np.random.default_rng(0)
    medians = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        ends = np.cumsum(times[patient])  # places of each value in the sorted resample
        middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
        medians[i] = ranked[middle].mean()
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values after Holm's step-down correction, in the order given."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected.tolist()


def grouped(rows: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Groups rows by `key(row)`, in the order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _tasks_and_all(
    rows: Sequence[ObjectScore],
) -> Iterator[tuple[str, str, Sequence[ObjectScore]]]:
    """Yields the rows of each task and modality; of several, then all rows as (ALL, ALL)."""
    groups = grouped(rows, attrgetter("task", "modality"))
    for (task, modality), members in groups.items():
        yield task, modality, members
    if len(groups) > 1:
        yield ALL, ALL, rows


def _empty_counts(rows: Sequence[ObjectScore]) -> Row:
    empty = [(row.truth_size == 0, row.predicted_size == 0) for row in rows]
    names = {"both_empty": (True, True), "missed": (False, True), "spurious": (True, False)}
    return {name: empty.count(which) for name, which in names.items()}


def _spread(rows: Sequence[ObjectScore]) -> Row:
    spread = {}
    one_unit = len({row.unit for row in rows}) == 1
    patients = np.array([row.case_id for row in rows])
    for name, metric in METRICS.items():
        values = np.array([row.scores[name] for row in rows], float)
        known = np.isfinite(values) & (one_unit or not metric.is_length)
        interval = bootstrap_median(values[known], patients[known])
        values = values[known] if known.any() else np.array([np.nan])
        numbers = *np.quantile(values, (0.5, 0.25, 0.75)), values.mean(), *interval
        statistics = ("median", "q1", "q3", "mean", "median_low", "median_high")
        names = [f"{name}_{statistic}" for statistic in statistics]
        spread |= dict(zip(names, map(float, numbers), strict=True))
    return spread


def agreement(measured: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Measures how well measurements agree with the truth, both [n].

    Returns:
      n, Pearson's and Spearman's correlation, ICC(2,1) (two-way random effects, absolute
      agreement, single measurement: Shrout and Fleiss 1979), and Bland and Altman's bias (measured
      minus truth), its standard deviation and limits of agreement. NaN where n is too small (below
      3 for the correlations, which two points always fulfil), or where a side does not vary.
    """
    from scipy import stats

    n, nan = len(truth), float("nan")
    difference = measured - truth
    varies = n > 2 and np.ptp(measured) > 0 and np.ptp(truth) > 0
    deviation = float(difference.std(ddof=1)) if n > 1 else nan
    bias = float(difference.mean()) if n else nan
    return {
        "n": n,
        "pearson": float(stats.pearsonr(measured, truth)[0]) if varies else nan,
        "spearman": float(stats.spearmanr(measured, truth)[0]) if varies else nan,
        "icc": intraclass_correlation(np.stack([measured, truth], axis=1)),
        "bias": bias,
        "sd": deviation,
        "lower_limit": bias - 1.96 * deviation,
        "upper_limit": bias + 1.96 * deviation,
    }


def intraclass_correlation(ratings: Real[np.ndarray, "n k"]) -> float:
    """ICC(2,1) of n targets rated by k raters; NaN for fewer than three targets or no variance."""
    n, k = ratings.shape
    if n < 3:
        return float("nan")
    mean = ratings.mean()
    rows = k * np.sum((ratings.mean(axis=1) - mean) ** 2) / (n - 1)
    columns = n * np.sum((ratings.mean(axis=0) - mean) ** 2) / (k - 1)
    total = np.sum((ratings - mean) ** 2)
    error = (total - rows * (n - 1) - columns * (k - 1)) / ((n - 1) * (k - 1))
    denominator = rows + (k - 1) * error + k * (columns - error) / n
    return float((rows - error) / denominator) if denominator > 0 else float("nan")
