"""Summaries of scores and the tests that compare checkpoints on the same objects."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from medsam_jax.metrics import METRICS

Row = dict[str, Any]
ALL = "all"  # stands for every task or modality in a table


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row per checkpoint, prompt, shift and reference, task and modality, and one over all.

    NaN (both masks empty) and infinite distances (one empty) stay out of the statistics; how many
    objects that are is in `both_empty`, `missed` (truth without prediction) and `spurious`. `unit`
    is that of the distances, which have no statistics where mm and pixels meet.
    """
    summary = []
    names = ("checkpoint", "prompt", "box_shift", "reference")
    for keys, group in _grouped(rows, *names):
        parts = list(_grouped(group, "task", "modality"))
        if len(parts) > 1:
            parts.append(((ALL, ALL), group))
        for (task, modality), members in parts:
            row = dict(zip(names, keys, strict=True))
            row |= {"task": task, "modality": modality, "unit": units(members)}
            row |= {"cases": count_cases(members)}
            summary.append(row | {"n": len(members)} | _empty_counts(members) | _spread(members))
    return summary


def first_setting(rows: Sequence[Row]) -> list[Row]:
    """The rows with the first row's box shift and reference: those of the main table."""
    wanted = rows[0]["box_shift"], rows[0]["reference"]
    return [row for row in rows if (row["box_shift"], row["reference"]) == wanted]


def units(rows: Iterable[Row]) -> str:
    """Of the distances and the tolerance: "mm", "px", or "mm or px" of volumes and pictures."""
    return " or ".join(sorted({unit for row in rows for unit in row["unit"].split(" or ")}))


def count_cases(rows: Iterable[Row]) -> int:
    """Number of different cases."""
    return len({row["case_id"] for row in rows})


def compare(rows: Sequence[Row], metrics: Sequence[str] = ("dice", "nsd")) -> list[Row]:
    """Wilcoxon signed-rank tests between all pairs of checkpoints, Holm-corrected.

    The pairs are cases: the mean over a case's objects, because slices of one patient are not
    independent. One correction covers all tests of the returned table. Only rows of the first
    shift and reference enter.
    """
    rows = first_setting(rows)
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    groups = list(_grouped(rows, "task", "modality"))
    if len(groups) > 1:
        groups.append(((ALL, ALL), rows))
    tests = []
    for (task, modality), members in groups:
        for metric in metrics:
            means = {name: case_means(members, name, metric) for name in checkpoints}
            for a, b in itertools.combinations(checkpoints, 2):
                cases = sorted(means[a].keys() & means[b].keys())
                if not cases:
                    continue
                difference = np.array([means[b][case] - means[a][case] for case in cases])
                test = {"task": task, "modality": modality, "metric": metric}
                test |= {"checkpoint_a": a, "checkpoint_b": b, "cases": len(cases)}
                test |= {"median_b_minus_a": float(np.median(difference))}
                tests.append(test | {"p": signed_rank(difference)})
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    return tests


def case_means(rows: Iterable[Row], checkpoint: str, metric: str) -> dict[tuple[str, str], float]:
    """Mean score of each (task, case), over its objects that have one."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["checkpoint"] == checkpoint and np.isfinite(row[metric]):
            values.setdefault((row["task"], row["case_id"]), []).append(row[metric])
    return {case: float(np.mean(scores)) for case, scores in values.items()}


def signed_rank(difference: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 when nothing differs."""
    from scipy import stats

    if not np.any(difference):
        return 1.0
    # Pratt keeps pairs without a difference in the ranking; the exact distribution allows no ties.
    ties = len(np.unique(np.abs(difference))) < len(difference)
    exact = not ties and np.all(difference) and len(difference) <= 50
    method = "exact" if exact else "approx"
    return float(stats.wilcoxon(difference, zero_method="pratt", method=method).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected.tolist()


def _grouped(rows: Iterable[Row], *names: str) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    """Groups by fields, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups.items()


def _empty_counts(rows: Sequence[Row]) -> Row:
    def count(condition: Callable[[bool, bool], bool]) -> int:
        return sum(condition(row["truth_size"] > 0, row["predicted_size"] > 0) for row in rows)

    return {
        "both_empty": count(lambda truth, predicted: not truth and not predicted),
        "missed": count(lambda truth, predicted: truth and not predicted),
        "spurious": count(lambda truth, predicted: predicted and not truth),
    }


def _spread(rows: Sequence[Row]) -> Row:
    spread = {}
    one_unit = len({row["unit"] for row in rows}) == 1
    for metric, (_, is_share) in METRICS.items():
        values = np.array([row[metric] for row in rows], float)
        values = values[np.isfinite(values) & (is_share or one_unit)]
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else [np.nan] * 3
        mean = values.mean() if len(values) else np.nan
        names = ("median", "q1", "q3", "mean")
        numbers = (middle, low, high, mean)
        spread |= {f"{metric}_{n}": float(x) for n, x in zip(names, numbers, strict=True)}
    return spread


def agreement(measured: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How well measurements agree with the truth, both [n].

    Returns:
      n, Pearson's and Spearman's correlation, ICC(2,1) (two-way random effects, absolute
      agreement, single measurement: Shrout and Fleiss 1979), and Bland and Altman's bias (measured
      minus truth), its standard deviation and limits of agreement. NaN where n is too small (below
      3 for the correlations, which two points always fulfil), or where a side does not vary.
    """
    from scipy import stats

    n = len(truth)
    difference = measured - truth
    varies = n > 2 and np.ptp(measured) > 0 and np.ptp(truth) > 0
    deviation = float(difference.std(ddof=1)) if n > 1 else float("nan")
    bias = float(difference.mean()) if n else float("nan")
    return {
        "n": n,
        "pearson": float(stats.pearsonr(measured, truth)[0]) if varies else float("nan"),
        "spearman": float(stats.spearmanr(measured, truth)[0]) if varies else float("nan"),
        "icc": intraclass_correlation(np.stack([measured, truth], axis=1))
        if n > 2
        else float("nan"),
        "bias": bias,
        "sd": deviation,
        "lower_limit": bias - 1.96 * deviation,
        "upper_limit": bias + 1.96 * deviation,
    }


def intraclass_correlation(ratings: Float[np.ndarray, "n k"]) -> float:
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
