"""A small hospital folder: scans of several formats, and the data set built from it.

Imports are inside: most tests need neither.
"""

import locale
import os
import pathlib

import jaxtyping
import pytest

from tests.quick import XLA_FLAGS

# Commands that tests start inherit them. With `XLA_FLAGS=` tests compile as users do.
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)

# Shapes, dtypes and types of annotations are checked in every call; an int passes for a float. The
# hook sees only modules that are imported after it, and each worker of xdist installs its own.
jaxtyping.install_import_hook(
    ["medsam_jax", "weights_converter", "datasets"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_configure(config):
    """Keeps compiled programs: many tests train or run the same tiny model.

    A folder for each worker, as jax does not lock it. Environment variables are for the commands
    that tests start: a plugin may have imported jax before, and a worker inherits the variables of
    the process that started it.
    """
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    import jax

    folder = config.cache.mkdir(f"xla_{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}")
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.1),
    ):
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


_LOCALE = locale.setlocale(locale.LC_CTYPE)


@pytest.fixture(autouse=True)
def same_locale():
    """SimpleITK's DICOM writer, which only tests use, sets the process's locale to C."""
    locale.setlocale(locale.LC_CTYPE, _LOCALE)


@pytest.fixture
def unchecked():
    """Annotations are not checked: for wrong types that the function itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def hospital(tmp_path_factory) -> pathlib.Path:
    """Manifest of four CT, two MR (of patients who have a CT too) and two pictures."""
    from tests.datasets.scans import make_ct, make_mr, make_picture, write_manifest

    folder = tmp_path_factory.mktemp("hospital")
    rows = []
    for index, split in enumerate(("train", "train", "tune", "validation")):
        make_ct(folder, f"ct{index}", seed=index)
        files = (f"ct{index}.nii.gz", f"ct{index}_mask.nii.gz")
        rows.append((f"p{index}", *files, "CT", "organs", split))
    for index in (0, 3):
        make_mr(folder, f"mr{index}", seed=10 + index)
        rows.append((f"p{index}", f"mr{index}.nrrd", f"mr{index}_mask.nrrd", "MR", "tumour", ""))
    for index, colour in enumerate((False, True)):
        make_picture(folder, f"us{index}", colour, seed=20 + index)
        files = (f"us{index}.png", f"us{index}_mask.png")
        rows.append((f"u{index}", *files, "US", "mass", "train"))
    return write_manifest(folder / "cases.csv", rows)


@pytest.fixture(scope="session")
def built(hospital, tmp_path_factory) -> pathlib.Path:
    """The `lite` data set of the hospital folder; returns its data_dir."""
    from datasets.medical_slices import building, slices

    data_dir = tmp_path_factory.mktemp("data")
    options = slices.Options(recipe="lite")
    building.build(building.Request(str(hospital), str(data_dir), options))
    return data_dir
