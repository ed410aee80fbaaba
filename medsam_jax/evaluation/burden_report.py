"""Tables and Bland-Altman plots of tumour burden: per object, and summed per patient."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.evaluation import plots, tables
from medsam_jax.evaluation.statistics import ALL, agreement
from medsam_jax.metrics.lesion_size import MEASURES

Row = dict[str, Any]
KEYS = ("checkpoint", "task", "modality", "case_id")
NAMES = [f"{side}_{measure}" for measure in MEASURES for side in ("truth", "predicted")]
AGREEMENT_HEADINGS = ["level", "task", "modality", "checkpoint", "measure", "n", "Pearson"]
AGREEMENT_HEADINGS += ["Spearman", "ICC", "bias", "limits of agreement"]


def agreements(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Measurements of every object and patient, and how well they agree with the truth.

    A patient's burden in a task and modality is the sum over its objects: of the volumes, and of
    the diameters as RECIST and WHO do. Pictures have no mm and are left out. Where there are
    several tasks or modalities, there is also an agreement over all of them.
    """
    objects = [
        {"level": "object", **{name: row[name] for name in (*KEYS, "label", *NAMES)}}
        for row in rows
        if np.isfinite(row["truth_volume_ml"])
    ]
    patients: dict[tuple[str, ...], Row] = {}
    for row in objects:
        key = tuple(row[name] for name in KEYS)
        first = row | {"level": "patient", "label": "all", **dict.fromkeys(NAMES, 0.0)}
        total = patients.setdefault(key, first)
        for name in NAMES:
            total[name] += row[name]
    measured = objects + list(patients.values())
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in measured:
        key = tuple(row[name] for name in ("level", "checkpoint", "task", "modality"))
        groups.setdefault(key, []).append(row)
    if len({key[2:] for key in groups}) > 1:
        for row in measured:
            key = (row["level"], row["checkpoint"], ALL, ALL)
            groups.setdefault(key, []).append(row)
    table = []
    for (level, checkpoint, task, modality), members in groups.items():
        for measure in MEASURES:
            truth, predicted = (
                np.array([row[f"{side}_{measure}"] for row in members])
                for side in ("truth", "predicted")
            )
            names = {"level": level, "task": task, "modality": modality}
            names |= {"checkpoint": checkpoint, "measure": measure}
            table.append(names | agreement(predicted, truth))
    return measured, table


def section(rows: Sequence[Row], agreements: Sequence[Row]) -> str:
    """The part of the page that is about burden: the table of agreements, and what is not in it."""
    unmeasured = [row for row in rows if not np.isfinite(row["truth_volume_ml"])]
    objects = {tuple(row[name] for name in (*KEYS[1:], "label")) for row in unmeasured}
    text = "\n## Tumour burden, agreement with the truth\n\n"
    if agreements:
        text += tables.markdown(AGREEMENT_HEADINGS, [_agreement_cells(row) for row in agreements])
    if objects:
        text += f"\nNot measured, for want of a spacing in mm: {len(objects)} objects.\n"
    return text


def _agreement_cells(row: Row) -> list[str]:
    """A row of the agreement table as printed cells; a dash where too few values say nothing."""

    def text(name: str, style: str) -> str:
        return format(row[name], style) if np.isfinite(row[name]) else "-"

    cells = [row["level"], row["task"], row["modality"], row["checkpoint"]]
    cells += [MEASURES[row["measure"]], str(row["n"])]
    cells += [text(name, ".3f") for name in ("pearson", "spearman", "icc")]
    limits = f"{row['lower_limit']:+.2f} to {row['upper_limit']:+.2f}"
    limits = limits if np.isfinite(row["sd"]) else "-"
    return [*cells, text("bias", "+.2f"), limits]


def write_figures(folder: Path, measured: Sequence[Row]) -> list[str]:
    """One Bland-Altman figure per checkpoint, a panel per measure, over objects."""
    names = []
    objects = [row for row in measured if row["level"] == "object"]
    for number, checkpoint in enumerate(dict.fromkeys(row["checkpoint"] for row in objects), 1):
        members = [row for row in objects if row["checkpoint"] == checkpoint]
        names.append(f"burden_{number}.png")
        plots.save(_bland_altman(members, checkpoint), folder / names[-1])
    return names


def _bland_altman(rows: Sequence[Row], checkpoint: str) -> Any:
    figure = plots.figure_of(12.5, 3.6)
    groups = [(row["task"], row["modality"]) for row in rows]
    for axes, (measure, heading) in zip(
        figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True
    ):
        truth, predicted = (
            np.array([row[f"{side}_{measure}"] for row in rows]) for side in ("truth", "predicted")
        )
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
