"""Writes the results of an evaluation: tables, tests, figures and a page to read."""

import functools
import itertools
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from medsam_jax.drawing import save_figures
from medsam_jax.evaluation import burden_report, plots, statistics, tables
from medsam_jax.evaluation.base import Evaluation, ObjectScore
from medsam_jax.evaluation.statistics import Row
from medsam_jax.io.files import write_text
from medsam_jax.metrics import METRICS


def write_report(
    evaluation: Evaluation, rows: Sequence[ObjectScore], settings: dict[str, Any]
) -> None:
    """Writes per_object.csv, summary.csv, comparisons.csv, summary.md, summary.tex and figures/.

    Also writes per_label.csv where labels have names or a task has several, per_slice.csv where
    slices were scored, and burden.csv and burden_agreement.csv where the rows hold volumes and
    diameters.

    Args:
      evaluation: the one that scored the rows; it also draws their pictures.
      rows: one per object, checkpoint and box shift, in order.
      settings: facts that the numbers depend on, for the reader.
    """
    output, columns, slice_rows = evaluation.output, evaluation.columns, evaluation.slice_rows
    tables.write_csv(output / "per_object.csv", [row.table_row(columns) for row in rows])
    summary = statistics.summarise(rows)
    tables.write_csv(output / "summary.csv", summary)
    labels = statistics.by_label(rows)
    if labels:
        tables.write_csv(output / "per_label.csv", labels)
    tests = statistics.compare(rows)
    if tests:
        tables.write_csv(output / "comparisons.csv", tests)
    if slice_rows:
        tables.write_csv(output / "per_slice.csv", [row.table_row(columns) for row in slice_rows])
    figures = _write_figures(evaluation, rows)
    burden = ""
    if rows[0].burden:
        objects = statistics.first_setting(rows)
        measured, agreements = burden_report.agreements(objects)
        burden = burden_report.section(objects, agreements)
        if measured:
            tables.write_csv(output / "burden.csv", measured)
            tables.write_csv(output / "burden_agreement.csv", agreements)
            figures += burden_report.write_figures(output / "figures", measured)
    first = [row for row in summary if row["box_shift"] == rows[0].box_shift]
    caption = f"{evaluation.title}. Median (first to third quartile) over objects."
    table = tables.summary_table(first, evaluation.tolerance)
    write_text(output / "summary.tex", tables.latex(*table, caption))
    page = _page(evaluation, settings, summary, labels, tests, burden, figures)
    write_text(output / "summary.md", page)


def _write_figures(evaluation: Evaluation, rows: Sequence[ObjectScore]) -> list[str]:
    """Draws all figures that the rows allow; returns their names."""
    first = statistics.first_setting(rows)
    by_checkpoint = statistics.grouped(first, attrgetter("checkpoint"))
    checkpoints = list(by_checkpoint)
    unit = statistics.units(row.unit for row in first)
    draw_overview = functools.partial(plots.overview, by_checkpoint[checkpoints[0]], unit)
    figures: dict[str, Callable[[], Any]] = {"overview.png": draw_overview}
    for metric in (name for name, metric in METRICS.items() if metric.is_main):
        heading = METRICS[metric].title(evaluation.tolerance, unit)
        figures[f"box_{metric}.png"] = functools.partial(plots.box_plots, first, metric, heading)
        for a, b in itertools.combinations(range(len(checkpoints)), 2):
            pair = checkpoints[a], checkpoints[b]
            figures[f"scatter_{metric}_{a + 1}_{b + 1}.png"] = functools.partial(
                plots.paired_scatter, first, metric, *pair
            )
    if len({row.box_shift for row in rows}) > 1:
        same = [row for row in rows if row.reference == first[0].reference]
        figures["box_shift.png"] = functools.partial(plots.score_by_shift, same)
    for number, members in enumerate(by_checkpoint.values(), 1):
        draw_pictures = functools.partial(plots.picture_grid, members, evaluation.picture)
        figures[f"pictures_{number}.png"] = draw_pictures
    return save_figures(evaluation.output / "figures", figures)


def _page(
    evaluation: Evaluation,
    settings: dict[str, Any],
    summary: Sequence[Row],
    labels: Sequence[Row],
    tests: Sequence[Row],
    burden: str,
    figures: Sequence[str],
) -> str:
    lines = [f"# Evaluation: {evaluation.title}\n\n"]
    lines += [f"* {name}: {value}\n" for name, value in settings.items()]
    for shift, chosen in statistics.grouped(summary, itemgetter("box_shift")).items():
        prompt = chosen[0]["prompt"]
        name = f"box moved by up to {shift} px a side" if shift else f"{prompt} from the truth"
        lines += [f"\n## Scores, {name}\n\n"]
        lines += [tables.markdown(*tables.summary_table(chosen, evaluation.tolerance))]
    if labels:
        table = tables.summary_table(labels, evaluation.tolerance)
        lines += ["\n## Scores by label\n\n", tables.markdown(*table)]
    counts = {
        key: sum(row[key] for row in summary if row["task"] != statistics.ALL)
        for key in ("both_empty", "missed", "spurious")
    }
    lines += [
        "\nStatistics are over objects. Both masks empty: not scored. One empty: DSC, IoU and NSD "
        "are 0, distances are infinite and left out. Over all tables: "
        f"{counts['both_empty']} both empty, {counts['missed']} missed, "
        f"{counts['spurious']} spurious. 95 % intervals of medians: percentile bootstrap over "
        f"patients, {statistics.RESAMPLES} draws.\n"
    ]
    if any(row["trained_on"] for row in summary):
        lines += ["\n**Trained on**: patients of the row that its checkpoint was trained or tuned "]
        lines += ["on. Such a row is no test; `per_object.csv` marks its objects.\n"]
    if tests:
        lines += ["\n## Comparison\n\n"]
        lines += ["Wilcoxon signed-rank over patients: a patient's score is the mean over its "]
        lines += ["tasks and modalities of the mean over objects. Holm-corrected over the "]
        lines += [f"{len(tests)} tests of the table. Smallest p: of so many cases, if all differ "]
        lines += ["in one direction (two-sided, exact).\n\n"]
        cells = [tables.comparison_cells(test) for test in tests]
        lines += [tables.markdown(tables.COMPARISON_HEADINGS, cells)]
    lines += [burden, "\n## Figures\n\n", *[f"![{name}](figures/{name})\n\n" for name in figures]]
    return "".join(lines)
