"""The data card: README.md and figures of a built data set, from its record and its slices."""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from medsam_jax.data.datasets import DatasetInfo, label_name, open_dataset
from medsam_jax.data.manifest import SPLITS
from medsam_jax.drawing import TRUTHS, figure_of, save_figures
from medsam_jax.io.notes import summarise_notes

SAMPLES = 12  # slices in the sample grid
FIGURES = ("samples.png", "object_sizes.png", "spacings.png", "intensities.png")


def write(directory: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes `README.md` and `figures/` into `directory`; the data lie in `record`'s folder."""
    drawn = draw(DatasetInfo(directory, record), directory / "figures")
    (directory / "README.md").write_text(text(record, drawn), encoding="utf-8")


def text(record: dict[str, Any], figures: Sequence[str] = FIGURES) -> str:
    """Returns the card in Markdown."""
    recipe = record["recipe_fields"]
    lines = [
        f"# {record['name']}, recipe {record['recipe']}",
        "",
        f"Slices of {recipe['size']} x {recipe['size']} pixels ({recipe['geometry']}), "
        f"{sum(s['slices'] for s in record['splits'].values())} in all, with label maps. "
        "Everything below is from `medical_slices.json`, which holds each case's account too.",
        "",
        "| split | task and modality | cases | slices | objects |",
        "|---|---|---:|---:|---:|",
    ]
    for split in SPLITS:
        counts = record["splits"][split]
        lines.append(_row(f"**{split}**", "all", counts))
        lines += [
            _row("", name.replace("|", "/"), group)
            for name, group in counts["by_task_and_modality"].items()
        ]
    lines += ["", "## Object sizes, pixels of the stored grid", ""]
    lines += [
        "| task | label | objects | smallest | median | largest |",
        "|---|---|---:|---:|---:|---:|",
    ]
    by_label = sorted(object_sizes(record).items(), key=lambda item: _natural(*item[0]))
    for (task, label), sizes in by_label:
        lines.append(
            f"| {task} | {label} | {len(sizes)} | {min(sizes)} | {np.median(sizes):.0f} "
            f"| {max(sizes)} |"
        )
    lines += ["", "## Scans", "", "| task | modality | shape | spacing, mm | slices along |"]
    lines += ["|---|---|---|---|---|"]
    lines += [_scan_row(record, task, modality) for task, modality in _groups(record)]
    lines += ["", "## Dropped", ""]
    lines += ["| what | how many |", "|---|---:|"] if record["dropped"] else ["Nothing."]
    lines += [f"| {reason} | {count} |" for reason, count in record["dropped"].items()]
    noted = ((case["case_id"], case.get("notes", ())) for case in record["cases"])
    for title, found in (
        ("Rows that were skipped", record["skipped_rows"]),
        ("Cases without a slice left", record["cases_without_slices"]),
        ("Warnings", record["warnings"]),
        ("Notes on how files were read", summarise_notes(noted)),
    ):
        if found:
            lines += ["", f"## {title}", ""] + [f"* {line}" for line in found]
    lines += ["", "## How it was made", ""]
    lines += [f"* {name}: {value}" for name, value in sorted(recipe.items())]
    lines += [f"* {tool} {version}" for tool, version in sorted(record["tool_versions"].items())]
    lines += [f"* manifest {record['manifest']['path']}, sha256 {record['manifest']['sha256']}", ""]
    lines += [f"![{name}](figures/{name})" for name in figures]
    return "\n".join(lines) + "\n"


def _row(split: str, group: str, counts: dict[str, Any]) -> str:
    numbers = " | ".join(str(counts.get(name, 0)) for name in ("cases", "slices", "objects"))
    return f"| {split} | {group} | {numbers} |"


def _groups(record: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted({(case["task"], case["modality"]) for case in record["cases"]})


def _scan_row(record: dict[str, Any], task: str, modality: str) -> str:
    cases = [c for c in record["cases"] if (c["task"], c["modality"]) == (task, modality)]
    shapes = np.array([case["scan_shape"][:3] for case in cases])
    steps = [case["scan_spacing"] for case in cases if None not in case["scan_spacing"]]
    spacing = _range(np.round(np.array(steps), 3)) if steps else "unknown"
    axes = ", ".join(sorted({case["slice_axis"] for case in cases}))
    return f"| {task} | {modality} | {_range(shapes)} | {spacing} | {axes} |"


def _range(values: np.ndarray) -> str:
    """`low` or `low..high` of each column, in (z, y, x) order."""
    pairs = zip(values.min(axis=0).tolist(), values.max(axis=0).tolist(), strict=True)
    return " x ".join(f"{low:g}" if low == high else f"{low:g}..{high:g}" for low, high in pairs)


def object_sizes(record: dict[str, Any]) -> dict[tuple[str, str], list[int]]:
    """Pixels of every object by (task, label name); instances are under their label."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for case in record["cases"]:
        for kept in case["objects"]:
            for label, pixels in kept:
                name = label_name(record, case["task"], label)
                sizes.setdefault((case["task"], name), []).append(pixels)
    return sizes


def _natural(task: str, label: str) -> tuple[str, int, str]:
    """Sorts unnamed labels by their number."""
    return task, int(label) if label.isdigit() else 0, label


def draw(info: DatasetInfo, folder: pathlib.Path) -> list[str]:
    """Draws the card's figures into `folder`; returns the names of those that could be drawn."""
    each = zip(FIGURES, (_samples, _sizes, _spacings, _intensities), strict=True)
    return save_figures(folder, {name: functools.partial(of, info) for name, of in each}, dpi=90)


def _samples(info: DatasetInfo) -> Any:
    """Slices with contours: tasks and modalities in turn, evenly over their cases."""
    split = max(info.counts, key=lambda name: info.counts[name]["slices"])
    source, _ = open_dataset(info.directory, split)
    figure = figure_of(12, 9.6)
    axes = figure.subplots(3, SAMPLES // 3)
    chosen = _spread(info.groups(split))
    for axis, position in itertools.zip_longest(axes.flat, chosen):
        axis.axis("off")
        if position is None:
            continue
        record = source[position]
        labels = record["mask"][:, :, 0]
        axis.imshow(record["image"])
        for label in np.unique(labels[labels > 0]):
            colour = np.array(TRUTHS[(int(label) - 1) % len(TRUTHS)]) / 255
            axis.contour(labels == label, levels=[0.5], colors=[colour], linewidths=1)
        names = [record[name].decode() for name in ("task", "modality", "case_id")]
        axis.set_title("{} ({})\n{}".format(*names), fontsize=8)
    return figure


def _spread(groups: dict[tuple[str, str], np.ndarray]) -> list[int]:
    """Returns up to SAMPLES positions: the groups in turn, each evenly over its cases."""
    each = -(-SAMPLES // len(groups))
    picks = [
        positions[np.unique(np.linspace(0, len(positions) - 1, each + 2)[1:-1].astype(int))]
        for positions in groups.values()
    ]
    turns = itertools.zip_longest(*picks)
    return [int(at) for turn in turns for at in turn if at is not None][:SAMPLES]


def _sizes(info: DatasetInfo) -> Any:
    figure = figure_of(7, 4)
    axis = figure.subplots()
    by_task: dict[str, list[int]] = {}
    for (task, _), sizes in object_sizes(info.record).items():
        by_task.setdefault(task, []).extend(sizes)
    largest = max(max(sizes) for sizes in by_task.values())
    bins = np.geomspace(1, largest + 1, 40)
    for task, sizes in sorted(by_task.items()):
        axis.hist(sizes, bins=bins, histtype="step", label=f"{task} ({len(sizes)})")
    axis.set(xscale="log", xlabel="object size, pixels of the stored grid", ylabel="objects")
    axis.legend(fontsize=8)
    return figure


def _spacings(info: DatasetInfo) -> Any:
    figure = figure_of(7, 4)
    axis = figure.subplots()
    unknown, largest = 0, np.zeros(2)
    for task, modality in _groups(info.record):
        cases = [
            case["scan_spacing"]
            for case in info.record["cases"]
            if (case["task"], case["modality"]) == (task, modality)
        ]
        known = np.array([step for step in cases if None not in step])
        unknown += len(cases) - len(known)
        if len(known):
            axis.plot(known[:, 2], known[:, 0], "o", alpha=0.5, label=f"{task} ({modality})")
            axis.legend(fontsize=8)
            largest = np.maximum(largest, known[:, [2, 0]].max(axis=0))
    axis.set(xlabel="spacing along x, mm", ylabel="spacing along z, mm")
    if largest.all():  # from 0: scans of one spacing would be drawn as differences of nothing
        axis.set(xlim=(0, 1.2 * largest[0]), ylim=(0, 1.2 * largest[1]))
    axis.set_title(f"{unknown} scans without a known spacing", fontsize=9)
    return figure


def _intensities(info: DatasetInfo) -> Any:
    """Intensities by task and modality: of the scans, and of the stored slices."""
    groups = _groups(info.record)
    figure = figure_of(9, 2.2 * len(groups))
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (task, modality), (left, right) in zip(groups, axes, strict=True):
        cases = [
            case
            for case in info.record["cases"]
            if (case["task"], case["modality"]) == (task, modality)
        ]
        for case in cases:
            counts = np.array(case["histogram_before"]["counts"])
            low, high = case["histogram_before"]["edges"]
            left.stairs(counts / counts.sum(), np.linspace(low, high, len(counts) + 1), alpha=0.4)
        after = np.sum([case["histogram_after"] for case in cases], axis=0)
        right.stairs(after / after.sum(), np.linspace(0, 256, len(after) + 1), fill=True)
        for axis, name in ((left, "scans, each a line"), (right, "stored slices")):
            axis.set_yscale("log")
            axis.set_title(f"{task} ({modality}): {name}", fontsize=9)
    return figure
