"""Tables and Bland-Altman plots of tumour burden: per object, and summed per patient."""

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from medsam_jax.drawing import figure_of, save_figures
from medsam_jax.evaluation import plots, tables
from medsam_jax.evaluation.base import ObjectScore
from medsam_jax.evaluation.statistics import ALL, Row, agreement, grouped
from medsam_jax.metrics.lesion_size import MEASURES

KEYS = ("checkpoint", "task", "modality", "case_id")
NAMES = [f"{side}_{measure}" for measure in MEASURES for side in ("truth", "predicted")]
AGREEMENT_HEADINGS = ["level", "task", "modality", "checkpoint", "measure", "n", "Pearson"]
AGREEMENT_HEADINGS += ["Spearman", "ICC", "bias", "limits of agreement"]


def agreements(rows: Sequence[ObjectScore]) -> tuple[list[Row], list[Row]]:
    """Measures every object and patient, and how well predictions agree with the truth.

    A patient's burden in a task and modality is the sum over its objects: of the volumes, and of
    the diameters as RECIST and WHO do. Pictures have no mm and are left out. Where there are
    several tasks or modalities, there is also an agreement over all of them. In that a patient
    counts once: its tasks are summed, and its modalities, which show the same lesions, averaged.

    Returns:
      Rows of objects and patients, and rows of agreement.
    """
    objects = [
        {"level": "object"}
        | {name: getattr(row, name) for name in (*KEYS, "label")}
        | {name: row.burden[name] for name in NAMES}
        for row in rows
        if np.isfinite(row.burden["truth_volume_ml"])
    ]
    patients = _reduced(objects, KEYS, sum, {"level": "patient", "label": ALL})
    groups = grouped([*objects, *patients], itemgetter("level", "checkpoint", "task", "modality"))
    if len({key[2:] for key in groups}) > 1:
        by_modality = _reduced(patients, ("checkpoint", "modality", "case_id"), sum)
        once = _reduced(by_modality, ("checkpoint", "case_id"), fmean)
        pooled = grouped([*objects, *once], itemgetter("level", "checkpoint"))
        groups |= {(*key, ALL, ALL): members for key, members in pooled.items()}
    table = []
    for (level, checkpoint, task, modality), members in groups.items():
        for measure in MEASURES:
            truth, predicted = _both_sides(members, measure)
            names = {"level": level, "task": task, "modality": modality}
            names |= {"checkpoint": checkpoint, "measure": measure}
            table.append(names | agreement(predicted, truth))
    return [*objects, *patients], table


def _reduced(
    rows: Sequence[Row],
    keys: Sequence[str],
    function: Callable[[list[float]], float],
    changes: Row | None = None,
) -> list[Row]:
    """Returns one row for each group: `function` of its measurements, the rest of its first row."""
    reduced = []
    for members in grouped(rows, itemgetter(*keys)).values():
        values = {name: function([row[name] for row in members]) for name in NAMES}
        reduced.append(members[0] | (changes or {}) | values)
    return reduced


def _both_sides(rows: Sequence[Row], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a measurement of all rows by the truth and by the prediction."""
    truth, predicted = np.array(
        [(row[f"truth_{measure}"], row[f"predicted_{measure}"]) for row in rows]
    ).T
    return truth, predicted


def section(rows: Sequence[ObjectScore], agreements: Sequence[Row]) -> str:
    """Returns the page's part about burden: the table of agreements and the count of the rest."""
    unmeasured = [row for row in rows if not np.isfinite(row.burden["truth_volume_ml"])]
    objects = {(row.task, row.modality, row.case_id, row.label) for row in unmeasured}
    text = "\n## Tumour burden, agreement with the truth\n\n"
    if agreements:
        text += tables.markdown(AGREEMENT_HEADINGS, [_agreement_cells(row) for row in agreements])
    if objects:
        text += f"\nNot measured, for lack of a spacing in mm: {len(objects)} objects.\n"
    return text


def _agreement_cells(row: Row) -> list[str]:
    """Returns a row of the agreement table as cells; a dash where the values are too few."""

    def text(name: str, style: str) -> str:
        return format(row[name], style) if np.isfinite(row[name]) else "-"

    cells = [row["level"], row["task"], row["modality"], row["checkpoint"]]
    cells += [MEASURES[row["measure"]], str(row["n"])]
    cells += [text(name, ".3f") for name in ("pearson", "spearman", "icc")]
    limits = f"{row['lower_limit']:+.2f} to {row['upper_limit']:+.2f}"
    limits = limits if np.isfinite(row["sd"]) else "-"
    return [*cells, text("bias", "+.2f"), limits]


def write_figures(folder: Path, measured: Sequence[Row]) -> list[str]:
    """Draws one Bland-Altman figure per checkpoint, a panel per measure, over objects."""
    objects = [row for row in measured if row["level"] == "object"]
    by_checkpoint = grouped(objects, itemgetter("checkpoint"))
    return save_figures(
        folder,
        {
            f"burden_{number}.png": functools.partial(_bland_altman, members, checkpoint)
            for number, (checkpoint, members) in enumerate(by_checkpoint.items(), 1)
        },
    )


def _bland_altman(rows: Sequence[Row], checkpoint: str) -> Any:
    figure = figure_of(12.5, 3.6)
    groups = [(row["task"], row["modality"]) for row in rows]
    for axes, (measure, heading) in zip(
        figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True
    ):
        truth, predicted = _both_sides(rows, measure)
        agreed = agreement(predicted, truth)
        for number, group in enumerate(dict.fromkeys(groups)):
            chosen = np.array([one == group for one in groups])
            x, y = ((truth + predicted) / 2)[chosen], (predicted - truth)[chosen]
            colour = plots.COLOURS[number % len(plots.COLOURS)]
            axes.plot(x, y, ".", color=colour, label=", ".join(group))
        for name, style in (("bias", "-"), ("lower_limit", "--"), ("upper_limit", "--")):
            if np.isfinite(agreed[name]):
                axes.axhline(agreed[name], color="0.4", linestyle=style, linewidth=1)
        axes.set_title(heading, fontsize=9)
        axes.set(xlabel="mean of truth and prediction", ylabel="prediction \N{MINUS SIGN} truth")
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside right upper", fontsize="small", frameon=False)
    figure.suptitle(f"{checkpoint}: bias and 95 % limits of agreement", fontsize=10)
    return figure
