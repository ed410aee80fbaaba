"""Two scans with two objects each, and a manifest of them."""

import numpy as np
import pytest

from medsam_jax.evaluation import base
from tests.evaluation.fakes import BrightInBox
from tests.evaluation.scans import ball, write, write_manifest


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Two scans, CT and MR; the model finds what is bright, which is a little beside the truth."""
    monkeypatch.setattr(base, "load_model", lambda name: BrightInBox(float(name)))
    rows = []
    for case, modality, shape in (("one", "CT", (9, 100, 128)), ("two", "MR", (7, 120, 90))):
        truth = ball(shape, (4, 50, 40), 11).astype(np.uint8)
        truth[ball(shape, (3, 30, 70), 8)] = 3
        bright = ball(shape, (4, 51, 40), 11) | ball(shape, (3, 30, 70), 7)
        scan = np.where(bright, 900, -400).astype(np.int16)
        if modality == "MR":
            scan = scan + 500
        reader = ball(shape, (4, 50, 41), 10).astype(np.uint8)
        reader[truth == 3] = 3
        write(tmp_path / f"{case}.nii.gz", scan)
        write(tmp_path / f"{case}_mask.nii.gz", truth)
        write(tmp_path / f"{case}_reader.nii.gz", reader)
        rows.append([case, f"{case}.nii.gz", f"{case}_mask.nii.gz", modality, "balls"])
    return write_manifest(tmp_path / "cases.csv", rows)
