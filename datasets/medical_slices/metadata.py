"""`medical_slices.json`: the record of a built data set."""

import collections
import json
import pathlib
import platform
from typing import Any

import numpy as np

from medsam_jax.data.datasets import RECORD_FILE
from medsam_jax.data.manifest import SPLITS
from medsam_jax.data.recipes import get_recipe
from medsam_jax.io.files import versions

from . import slices
from .medical_slices_dataset_builder import Plan

TOOLS = ("medsam_jax", "numpy", "scipy", "SimpleITK", "opencv-python-headless", "pillow")
TOOLS += ("tensorflow-datasets", "array-record")


def tool_versions() -> dict[str, str]:
    """Returns versions of all packages that changed pixels; "source tree" where not installed."""
    unknown = dict.fromkeys(TOOLS, "source tree")
    return {"python": platform.python_version()} | unknown | versions(TOOLS)


def collect(
    plan: Plan,
    checked: list[slices.Checked],
    skipped: list[str],
    warnings: list[str],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Returns the record of a finished build, from the reports of its workers."""
    reports = {
        report["row"]: report
        for report in map(_load, sorted(pathlib.Path(plan.report_dir).glob("row-*.json")))
    }
    drops: collections.Counter = collections.Counter()
    for item in checked:
        drops.update(dict(item.drops))
        reports.get(item.case.row, {})["image_sha256"] = item.image_sha256
    without = [item.case.row_name for item in checked if not item.problems and item.slices == 0]
    if without:
        drops["cases without a slice left"] = len(without)
    return {
        "format_version": 1,
        "recipe": plan.options.recipe,
        "recipe_fields": get_recipe(plan.options.recipe).to_dict(),
        **provenance,
        "tool_versions": tool_versions(),
        "options": {"axis": plan.options.axis, "instances": plan.options.instances},
        "labels": _label_names(plan),
        "splits": {split: _counts(plan, reports, split) for split in SPLITS},
        "dropped": dict(sorted(drops.items())),
        "cases_without_slices": without,
        "skipped_rows": skipped,
        "warnings": warnings,
        "cases": [reports[case.row] for case in plan.ordered_cases()],
    }


def write(directory: pathlib.Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the record, and per split the index of its objects, beside the ArrayRecord files.

    Returns the record as it will be read back.
    """
    for split in SPLITS:
        positions, labels = [], []
        position = 0
        for case in record["cases"]:
            if case["split"] != split:
                continue
            for kept in case["objects"]:
                positions += [position] * len(kept)
                labels += [label for label, _ in kept]
                position += 1
        if position:
            np.savez_compressed(
                directory / f"objects-{split}.npz",
                position=np.array(positions, np.int64),
                label=np.array(labels, np.uint8),
            )
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    (directory / RECORD_FILE).write_text(text, encoding="utf-8")
    return json.loads(text)


def _load(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _counts(plan: Plan, reports: dict[int, Any], split: str) -> dict[str, Any]:
    """Cases, slices and objects of a split, in all and by task and modality."""
    groups: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    patients = collections.defaultdict(set)
    for case in plan.ordered_cases():
        if case.split != split:
            continue
        report = reports[case.row]
        for name in ("total", f"{case.task} | {case.modality}"):
            patients[name].add(case.case_id)
            groups[name]["slices"] += report["slices"]
            groups[name]["objects"] += sum(len(kept) for kept in report["objects"])
    total = groups.pop("total", collections.Counter())
    return {
        "cases": len(patients["total"]),
        "slices": total["slices"],
        "objects": total["objects"],
        "by_task_and_modality": {
            name: {"cases": len(patients[name]), **counts}
            for name, counts in sorted(groups.items())
        },
    }


def _label_names(plan: Plan) -> dict[str, Any]:
    """For each task: stored id -> original id and name; ids above are instances of one label."""
    names = {(task, label): name for task, label, name in plan.options.labels}
    described = {}
    for task, table in sorted(plan.tables.items()):
        entries: dict[str, Any] = {
            str(stored): {
                "original": original,
                "name": names.get((task, original)) or names.get(("", original)) or str(original),
            }
            for original, stored in sorted(table.items())
        }
        if plan.options.instances in table:
            entries["above"] = {"instances_of": table[plan.options.instances]}
        described[task] = entries
    return described
