"""The wheel: the files it holds, and its commands in an environment without a clone."""

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from medsam_jax import __version__
from medsam_jax.__main__ import COMMANDS
from medsam_jax.data.datasets import find_dataset
from tests.datasets.scans import make_ct, write_manifest
from tests.docs.wheel import ROOT, build_wheel, install

FLAGS = {  # a flag of each command's own
    "manifest": "--nnunet",
    "inspect": "--[no]json",
    "build": "--recipe",
    "train": "--workdir",
    "report": "--[no]version",
    "evaluate": "--folds",
    "serve": "--port",
    "predict": "--prompt_mask",
    "export": "--platforms",
    "convert": "--naming",
    "init": "--features",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture
def run(programs, tmp_path):
    """Returns a function that runs a program of the environment in an empty folder."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str, status: int = 0) -> str:
        command = [str(programs / program), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    return run


def modules(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}


def test_the_wheel_holds_the_builder_and_the_configs_under_its_own_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"medsam_jax", "weights_converter", f"medsam_jax-{__version__}.dist-info"}
    for folder in ("datasets", "configs"):
        assert {f"medsam_jax/{folder}/{name}" for name in modules(folder)} <= names
    assert "medsam_jax/datasets/medical_slices/README.md" in names
    assert {"medsam_jax/py.typed", "weights_converter/py.typed"} <= names
    builder = zipfile.ZipFile(wheel).read("medsam_jax/datasets/__init__.py")
    assert builder == (ROOT / "datasets/__init__.py").read_bytes()  # not the clone's alias


def test_the_environment_has_the_wheel_and_no_datasets(run):
    code = "import medsam_jax, importlib.util as u; print(medsam_jax.__file__, u.find_spec('{}'))"
    for name in ("datasets", "configs"):
        text = run("python", "-c", code.format(name))
        assert "environment" in text
        assert text.endswith("None\n")


def test_the_script_lists_its_commands(run):
    assert set(FLAGS) == set(COMMANDS)
    text = run("medsam-jax", "--help")
    assert text == run("python", "-m", "medsam_jax")
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert run("medsam-jax", "--version") == f"medsam_jax {__version__}\n"
    wrong = run("medsam-jax", "biuld", status=1)
    assert wrong == "error: 'biuld' is no command; see medsam-jax --help\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_flags(run, command):
    text = run("medsam-jax", command, "--help")
    assert f"  {FLAGS[command]}:" in text
    assert "python -m datasets" not in text
    assert run("medsam-jax", command, "--version") == f"medsam_jax {__version__}\n"


def test_a_data_set_is_built_and_its_next_command_is_understood(run, tmp_path):
    rows = []
    for index, split in enumerate(("train", "tune", "validation")):
        make_ct(tmp_path, f"ct{index}", seed=index)
        files = (f"ct{index}.nii.gz", f"ct{index}_mask.nii.gz")
        rows.append((f"p{index}", *files, "CT", "organs", split))
    write_manifest(tmp_path / "cases.csv", rows)
    flags = ["--manifest", "cases.csv", "--data_dir", "data", "--num_workers", "2"]
    text = run("medsam-jax", "build", *flags)
    assert find_dataset(tmp_path / "data").counts["train"]["slices"]
    (command,) = re.findall(r"^next: (.*)$", text, re.MULTILINE)
    program, *arguments = command.split()
    assert (program, *arguments[:3]) == ("medsam-jax", "train", "--config", "lite_medsam")
    wrong = run(program, *arguments, "--config.mesh.data=3", status=1)
    assert wrong.startswith("error: config.mesh: data 3 x fsdp 1")


def test_every_config_is_found_by_its_name(run, tmp_path):
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert "boxes_and_points_augmented" in names  # which imports another config
    for name in names:
        text = run("medsam-jax", "train", f"--config={name}", "--config.data_dir=data",
                   "--workdir=run", status=1)  # fmt: skip
        # The config was read: what is missing is the data set, or what its fields need.
        assert re.match("error: (data: holds no medical_slices data set|config.embedding_)", text)
    (tmp_path / "demo").write_text("a file of that name comes first")
    assert "error: command line" in run("medsam-jax", "train", "--config=demo", "--workdir=run",
                                        status=1)  # fmt: skip
