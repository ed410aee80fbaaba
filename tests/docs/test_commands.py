"""Runs the commands and Python examples of README.md and docs/, as they stand there.

Each page has a folder of its own, laid out as the repository's root, with small files under the
names that its blocks use. `lite_medsam` is a directory there, a tiny model, which the commands take
before they look for known weights. A block that cannot be run stands in `NOT_RUN` with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.training.config import base_config
from tests.datasets.scans import write_manifest, write_volume
from tests.tiny import tiny_sam

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
CODE = ("benchmarks", "configs", "datasets", "launch", "medsam_jax", "scripts", "weights_converter")
COMMAND = re.compile(
    r"(\$ )?(\S*python3?|pip|make|for|tensorboard|medsam-jax|\w+=\$?\S*) ", re.MULTILINE
)
RUN_ELSEWHERE = {  # page: test
    "docs/extending.md": "tests/test_extending.py",
    "docs/first_hour.md": "tests/docs/test_walk.py",
}

# Page and a part of a block -> why it is not run.
NOT_RUN = {
    ("README.md", "make demo"): "network and minutes",
    ("README.md", "python3 -m venv"): "installs packages",
    ("README.md", "python -m medsam_jax.predict"): "one of the commands of docs/inference.md",
    ("docs/automatic_masks.md", "pip download"): "network",
    ("docs/automatic_masks.md", "python -m benchmarks.automatic_memory"): "minutes",
    ("docs/automatic_masks.md", ".venv-parity/bin/python"): "needs PyTorch",
    ("docs/evaluation.md", "--checkpoint lite_medsam,runs/demo/best"): "as in README.md",
    ("docs/evaluation.md", "python -m weights_converter.init"): "minutes of training",
    ("docs/evaluation.md", "--config.fold=$i/5"): "five runs; tests/training/test_folds.py",
    ("docs/inference.md", "python scripts/propagation_table.py"): "encodes whole scans; minutes",
    ("docs/parity.md", "python scripts/parity_table.py"): "needs the demo's scans",
    ("docs/performance.md", "make bench"): "needs PyTorch; an hour",
    ("docs/results.md", "datasets.build --manifest sarcoma/cases.csv"): "hours",
    ("docs/results.md", "--box_shift 0,5,10,20 --output runs/eval_unet"): "patients' scans",
    ("docs/results.md", "python scripts/results.py"): "patients' scans",
    ("docs/results.md", "runs/sarcoma_$seed"): "hours",
    ("docs/results.md", "sarcoma/soft.csv"): "hours",
    ("docs/results.md", "runs/augmented_$seed"): "hours",
    ("docs/viewers.md", "pip install"): "serves until Ctrl-C; tests/serving",
    ("docs/viewers.md", "--host 0.0.0.0"): "serves until Ctrl-C; tests/serving",
    (
        "docs/results.md",
        "boxes_and_points_encoder.py",
    ): "hours",
    ("docs/results.md", "benchmarks.unet_pytorch"): "hours, and PyTorch",
    ("docs/results.md", "runs/unet/box_0_mr"): "hours",
    ("docs/training.md", "python -m medsam_jax.train"): "5000 steps",
    ("docs/training.md", "config.optimizer"): "lines of a config; tests/training/test_optimizer.py",
    ("docs/training.md", "python scripts/kill_test.py"): "minutes; tests/cluster/test_kills.py",
    ("docs/performance.md", "make accelerators"): "libtpu, the CUDA plugin, and hours",
    ("docs/training.md", "benchmarks.accelerators"): "libtpu and the CUDA plugin",
    ("docs/weights.md", "python -m weights_converter.convert --input sam_vit_b"): "files of 375 MB",
    ("docs/weights.md", "--output tuned.safetensors"): "a ViT-B; tests/weights_converter",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns language and text of a page's blocks that hold commands or Python."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(language, block) for language, block in found if is_code(language, block)]


def is_code(language: str, block: str) -> bool:
    return language in ("python", "bash") or bool(COMMAND.match(block))


def reason(page: str, block: str) -> str | None:
    if page in RUN_ELSEWHERE:
        return f"{RUN_ELSEWHERE[page]} runs them"
    found = [why for (of, part), why in NOT_RUN.items() if of == page and part in block]
    return found[0] if found else None


RUN = [page for page in PAGES if any(reason(page, block) is None for _, block in blocks(page))]


def test_every_block_is_found():
    """Commands do not hide in blocks that are taken for something else."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if re.search(r"^ *(\S*python|make|pip|medsam-jax) ", block, re.MULTILINE):
            assert is_code("", block), block


def test_the_table_of_reasons_has_no_dead_row():
    for page, part in NOT_RUN:
        assert sum(part in block for _, block in blocks(page)) == 1, (page, part)


def test_pages_with_commands_name_their_environment():
    for page in PAGES:
        if any(COMMAND.match(block) for language, block in blocks(page) if language != "python"):
            text = (ROOT / page).read_text(encoding="utf-8")
            before = re.split(r"^python ", text, maxsplit=1, flags=re.MULTILINE)[0]
            assert "source .venv/bin/activate" in before or ".venv-bench" in before, page


def test_config_fields_exist():
    config = base_config()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for field in re.findall(r"--config\.([a-z_.]*[a-z])\b", text):
            if field != "losses.focal":  # docs/extending.md adds it
                assert field in config.keys() or config[field] is not None, (page, field)  # noqa: SIM118


@pytest.fixture(scope="module")
def root(tmp_path_factory, built) -> Path:
    """Files that several pages use: code, models, a data set, scans."""
    folder = tmp_path_factory.mktemp("root")
    for name in CODE:
        (folder / name).symlink_to(ROOT / name)
    model = tiny_sam()
    for name in ("lite_medsam", "sam_vit_b", "runs/demo/best", "workdir/best"):
        save_model(folder / name, flatten_state(model), model.config, {"licence": "Apache-2.0"})
    shutil.copytree(built, folder / "data/demo")
    rng = np.random.default_rng(0)
    liver = np.zeros((54, 220, 270), np.uint8)
    liver[39:42, 120:210, 160:260] = 1
    ct = (rng.normal(0, 5, liver.shape) + 600.0 * liver - 500).astype(np.int16)
    write_volume(folder / "ct.nii.gz", ct, (0.8, 0.8, 5.0))
    write_volume(folder / "liver.nii.gz", liver, (0.8, 0.8, 5.0))
    photo = rng.integers(0, 255, (170, 190, 3)).astype(np.uint8)
    Image.fromarray(photo).save(folder / "photo.png")
    (folder / "scans").mkdir()
    for name in ("ct.nii.gz", "photo.png"):
        shutil.copy(folder / name, folder / "scans")
    rows, organ = [], np.zeros((3, 40, 40))
    organ[1:, 5:25, 6:20] = 1
    for split in ("train", "tune", "validation"):
        scan = (rng.normal(0, 5, (3, 40, 40)) + 600 * organ - 500).astype(np.int16)
        write_volume(folder / f"{split}.nii.gz", scan)
        write_volume(folder / f"{split}_liver.nii.gz", organ.astype(np.uint8))
        rows.append((split, f"{split}.nii.gz", f"{split}_liver.nii.gz", "CT", "liver", split))
    write_manifest(folder / "cases.csv", rows)
    page = (ROOT / "docs/inference.md").read_text(encoding="utf-8")
    (prompts,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (folder / "prompts.json").write_text(prompts, encoding="utf-8")
    return folder


def names_for(page: str, folder: Path) -> dict[str, object]:
    """Returns the variables that a page's Python takes as given."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (60, 80)).astype(np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[10:30, 20:50] = True
    masks, volume = np.stack([mask, ~mask]), np.stack([mask, mask, ~mask])
    given = {
        "README.md": {"image": pixels, "box": [20, 10, 49, 29], "truth": mask},
        "docs/automatic_masks.md": {"image": pixels, "slice_": pixels},
        "docs/evaluation.md": {
            "pred": volume,
            "target": volume[::-1],
            "preds": masks,
            "targets": masks[::-1],
        },
        "docs/export.md": {"image": pixels},
        "docs/inference.md": {"array": rng.normal(0, 30, (43, 220, 270))},
    }
    return given.get(page, {})


def run_commands(block: str, folder: Path) -> None:
    """Runs a block by bash; what its flags name as outputs is there afterwards."""
    if block.startswith("$ "):  # with its output
        block = "\n".join(line[2:] for line in block.splitlines() if line.startswith("$ "))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    for output in re.findall(r"--(?:output|workdir|data_dir) (\S+)", block):
        assert (folder / output).exists(), output


@pytest.mark.usefixtures("unchecked")  # as for users, lists pass for arrays
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page, root, tmp_path, monkeypatch):
    folder = tmp_path / "root"
    shutil.copytree(root, folder, symlinks=True)
    monkeypatch.chdir(folder)
    names = names_for(page, folder)
    for language, block in blocks(page):
        if reason(page, block) is None:
            if language == "python":
                exec(compile(block, page, "exec"), names)
            else:
                run_commands(block, folder)
