"""The data card of small and of uniform data sets."""

from pathlib import Path

import pytest

from datasets.medical_slices import card
from medsam_jax.data.datasets import DatasetInfo


def case(spacing):
    return {"task": "t", "modality": "CT", "scan_spacing": spacing}


@pytest.mark.parametrize("spacings", [[[3.0, 0.8, 0.8]] * 4, [[3.0, 0.8, 0.8], [5.0, 0.9, 0.7]]])
def test_spacings_are_drawn_from_zero(spacings):
    """Scans of one spacing are a dot away from the corner, not a scale of tiny differences."""
    figure = card._spacings(DatasetInfo(Path(), {"cases": [case(one) for one in spacings]}))
    (axis,) = figure.axes
    along_x, along_z = max(s[2] for s in spacings), max(s[0] for s in spacings)
    assert axis.get_xlim() == pytest.approx((0, 1.2 * along_x))
    assert axis.get_ylim() == pytest.approx((0, 1.2 * along_z))


def test_spacings_that_are_unknown_are_counted():
    figure = card._spacings(DatasetInfo(Path(), {"cases": [case([None, None, None])] * 2}))
    assert figure.axes[0].get_title() == "2 scans without a known spacing"


def record(dropped):
    counts = {"cases": 0, "slices": 0, "objects": 0, "by_task_and_modality": {}}
    return {
        "name": "n",
        "recipe": "lite",
        "recipe_fields": {"size": 256, "geometry": "pad"},
        "splits": dict.fromkeys(("train", "tune", "validation"), counts),
        "labels": {},
        "cases": [],
        "dropped": dropped,
        "skipped_rows": [],
        "cases_without_slices": [],
        "warnings": [],
        "tool_versions": {},
        "manifest": {"path": str(Path("cases.csv")), "sha256": "0"},
    }


def test_nothing_dropped_is_said_without_a_table():
    text = card.text(record({}), ())
    assert "## Dropped\n\nNothing.\n" in text
    assert "| what |" not in text
    assert "| what | how many |\n|---|---:|\n| small | 3 |\n" in card.text(record({"small": 3}), ())
