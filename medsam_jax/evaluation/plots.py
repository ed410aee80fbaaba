"""Figures over many results: box plots, paired scatter, box shift, picture grid, overview."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from medsam_jax.drawing import LEGEND, figure_of
from medsam_jax.evaluation.base import ObjectScore
from medsam_jax.evaluation.statistics import count_cases, grouped
from medsam_jax.metrics import METRICS

# Okabe and Ito's palette, for checkpoints and tasks.
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#f0e442"]
_LEGEND_STYLE = {"loc": "outside upper left", "fontsize": "small", "frameon": False}


def box_plots(rows: Sequence[ObjectScore], metric: str, heading: str) -> Any:
    """Draws one box per task and checkpoint, over objects, with every object as a dot."""
    groups = _unique((row.task, row.modality) for row in rows)
    checkpoints = _unique(row.checkpoint for row in rows)
    figure = figure_of(max(4.0, 1.5 + 0.7 * len(groups) * len(checkpoints)), 4.0)
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    width = min(0.8 / len(checkpoints), 0.4)
    for number, checkpoint in enumerate(checkpoints):
        colour = COLOURS[number % len(COLOURS)]
        values = [_values(rows, metric, checkpoint, group) for group in groups]
        places = np.arange(len(groups)) + (number - (len(checkpoints) - 1) / 2) * width
        line = {"color": colour, "linewidth": 1.2}
        style = dict.fromkeys(("boxprops", "whiskerprops", "capprops"), line)
        style["medianprops"] = line | {"linewidth": 2.5}
        axes.boxplot(values, positions=places, widths=0.7 * width, showfliers=False, **style)
        for x, scores in zip(places, values, strict=True):
            jitter = rng.uniform(-0.2, 0.2, len(scores)) * width
            axes.plot(x + jitter, scores, ".", color=colour, alpha=0.35, markersize=4)
        axes.plot([], [], color=colour, label=checkpoint)
    axes.set_xticks(range(len(groups)), [f"{task}\n{modality}" for task, modality in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel(heading)
    if not METRICS[metric].is_length:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(**_LEGEND_STYLE)
    return figure


def paired_scatter(rows: Sequence[ObjectScore], metric: str, a: str, b: str) -> Any:
    """Draws one dot per object: its score with checkpoint A and with checkpoint B."""
    figure = figure_of(4.8, 4.8)
    from matplotlib import ticker

    axes = figure.subplots()
    first = {_object(row): row.scores[metric] for row in rows if row.checkpoint == a}
    lowest = 0.8
    for number, task in enumerate(_unique(row.task for row in rows)):
        pairs = [
            (first[_object(row)], row.scores[metric])
            for row in rows
            if row.checkpoint == b and row.task == task and _object(row) in first
        ]
        x, y = np.reshape(pairs, (-1, 2)).T
        axes.plot(x, y, ".", color=COLOURS[number % len(COLOURS)], alpha=0.6, label=task)
        lowest = np.nanmin([lowest, *x, *y])
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    heading = METRICS[metric].heading
    ends = (np.floor(10 * lowest) / 10 - 0.02, 1.02)
    axes.set(xlabel=f"{heading}, {a}", ylabel=f"{heading}, {b}", xlim=ends, ylim=ends)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MultipleLocator(0.1))
    figure.legend(**_LEGEND_STYLE)
    return figure


def score_by_shift(rows: Sequence[ObjectScore]) -> Any:
    """Draws the median DSC and its quartiles against the box shift.

    Annotators are not prompted: the median of each is a dashed line.
    """
    figure = figure_of(5.0, 3.8)
    axes = figure.subplots()
    shifts = sorted({row.box_shift for row in rows})
    for number, checkpoint in enumerate(_unique(row.checkpoint for row in rows)):
        colour = COLOURS[number % len(COLOURS)]
        by_shift = [
            _values([row for row in rows if row.box_shift == shift], "dice", checkpoint)
            for shift in shifts
        ]
        if not all(len(values) for values in by_shift):
            level = np.median(np.concatenate(by_shift))
            axes.axhline(level, color=colour, linestyle="--", label=checkpoint)
            continue
        low, middle, high = np.transpose([np.quantile(v, (0.25, 0.5, 0.75)) for v in by_shift])
        axes.fill_between(shifts, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(shifts, middle, "o-", color=colour, label=checkpoint)
    axes.set_xticks(shifts)
    axes.set(xlabel="box shift, up to (pixels)", ylabel="DSC", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    figure.legend(**_LEGEND_STYLE)
    return figure


def training_curves(
    metrics: Mapping[str, Sequence[tuple[int, float]]], best_step: int | None
) -> Any:
    """Plots the loss, and the tune split's scores, by step; the best step is a dashed line.

    Args:
      metrics: steps and values by name, of `monitor.read_metrics`.
    """
    figure = figure_of(10.0, 3.4)
    left, right = figure.subplots(1, 2)
    steps, losses = zip(*metrics["train/loss"], strict=True)
    window = max(1, len(losses) // 10)  # one batch is noisier than the progress of many steps
    smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
    left.plot(steps, losses, color=COLOURS[0], alpha=0.3, label="loss")
    left.plot(steps[window - 1 :], smooth, color=COLOURS[0], label=f"mean of the last {window}")
    left.set(xlabel="step", title="training loss")
    left.legend()
    shown = {"dice": "DSC", "nsd": "NSD", "point_dice": "DSC, point", "point_nsd": "NSD, point"}
    for colour, (name, label) in zip(COLOURS, shown.items(), strict=False):
        if f"tune/{name}" in metrics:
            points = zip(*metrics[f"tune/{name}"], strict=True)
            right.plot(*points, "o-", color=colour, markersize=4, label=label)
    if best_step is not None:
        right.axvline(best_step, color="0.5", linestyle="--", label="best")
    right.set(xlabel="step", title="tune split, jittered boxes")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def picture_grid(rows: Sequence[ObjectScore], draw: Callable[[ObjectScore], np.ndarray]) -> Any:
    """Shows the objects of each task with best, median and worst DSC; rows of one checkpoint."""
    tasks = list(grouped(rows, attrgetter("task", "modality")).items())[:8]
    most = max(len(members) for _, members in tasks)
    columns = min(3, most)  # few objects: none is drawn twice, and no panel stays empty
    figure = figure_of(3.0 * max(columns, 2), 3.2 * len(tasks))
    grid = figure.subplots(len(tasks), columns, squeeze=False)
    for ((task, modality), members), line in zip(tasks, grid, strict=True):
        members = sorted(members, key=lambda row: np.nan_to_num(-row.scores["dice"]))
        places = {"best": 0, "median": len(members) // 2, "worst": len(members) - 1}
        if len(members) < 3:
            places = dict(zip(("best", "worst"), range(len(members)), strict=False))
        for axes in line[len(places) :]:
            axes.set_visible(False)
        for axes, (name, place) in zip(line, places.items(), strict=False):
            row = members[place]
            axes.imshow(draw(row))
            main = [m for m in METRICS.values() if m.is_main]
            scores = ", ".join(f"{m.heading} {row.scores[m.name]:.3f}" for m in main)
            where = f"{row.case_id}, slice {row.slice_index}, label {row.label_name}"
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{name}: {scores}", fontsize=9)
            axes.set_xlabel(where, fontsize=7)
        line[0].set_ylabel(f"{task} {modality}")
    figure.suptitle(f"{rows[0].checkpoint}: {LEGEND}", fontsize=9)
    return figure


def overview(rows: Sequence[ObjectScore], unit: str) -> Any:
    """Draws the number and the sizes of each task's objects; rows of one checkpoint."""
    groups = grouped(rows, attrgetter("task", "modality"))
    figure = figure_of(8.0, 1.5 + 0.4 * len(groups))
    from matplotlib import ticker

    left, right = figure.subplots(1, 2, sharey=True)
    for place, members in enumerate(groups.values()):
        cases, colour = count_cases(members), COLOURS[place % len(COLOURS)]
        left.barh(place, len(members), color=colour)
        text = f" {len(members)} in {cases} case{'s' * (cases > 1)}"
        left.text(len(members), place, text, va="center", fontsize=8)
        right.plot([row.truth_size for row in members], [place] * len(members), "|", color=colour)
    left.set_yticks(range(len(groups)), [f"{task}, {modality}" for task, modality in groups])
    left.invert_yaxis()  # shared: the first task on top
    left.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    left.set_xlabel("objects")
    left.margins(x=0.5)  # for the text beside the longest bar
    counted = unit.replace("mm", "voxels").replace("px", "pixels")
    right.set(xscale="log", xlabel=f"size of each ({counted})")
    sizes = [row.truth_size for row in rows]
    wide = max(sizes) > 50 * max(1, min(sizes))
    right.xaxis.set_major_locator(ticker.LogLocator(subs=(1,) if wide else (1, 2, 5)))
    right.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    right.xaxis.set_minor_formatter("")
    right.tick_params(axis="x", labelrotation=45)
    return figure


def _unique(items) -> list:
    return list(dict.fromkeys(items))


def _object(row: ObjectScore) -> tuple:
    return row.task, row.modality, row.case_id, row.slice_index, row.label


def _values(
    rows: Sequence[ObjectScore], metric: str, checkpoint: str, group: tuple[str, str] | None = None
) -> np.ndarray:
    values = [
        row.scores[metric]
        for row in rows
        if row.checkpoint == checkpoint and group in (None, (row.task, row.modality))
    ]
    return np.array(values)[np.isfinite(values)]
