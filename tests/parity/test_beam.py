"""Apache Beam's build of a data set beside the ordinary one."""

import filecmp

import pytest

from datasets.medical_slices import building, slices
from medsam_jax.data.datasets import find_dataset


@pytest.mark.filterwarnings("ignore")  # of Beam's own imports
def test_beam_writes_the_same_data_set(hospital, built, tmp_path):
    options = slices.Options(recipe="lite")
    building.build(
        building.Request(str(hospital), str(tmp_path), options, beam_runner="DirectRunner")
    )
    first, second = find_dataset(built).directory, find_dataset(tmp_path).directory
    names = sorted(path.name for path in first.rglob("*.*") if path.parent == first)
    equal, different, missing = filecmp.cmpfiles(first, second, names, shallow=False)
    assert (equal, different, missing) == (names, [], [])
