"""Says what a scan is, as every command would read it, and draws it; or prints a data set's card.

Takes a file, a DICOM folder (`FOLDER#SERIES_UID` for one of several series), a folder of scans, or
a built data set. The exit status is 0 if nothing would be refused.

Examples:
  medsam-jax inspect ct.nii.gz --mask liver.nii.gz
  medsam-jax inspect scans --json
  medsam-jax inspect data --output card
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from medsam_jax.cli import progress, run
from medsam_jax.errors import UserError
from medsam_jax.io.files import check_writable

_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "A built data set (--data_dir of datasets.build, or a version folder)."
)
_MASK = flags.DEFINE_string("mask", None, "Mask of the image: its labels are counted and drawn.")
_MODALITY = flags.DEFINE_string("modality", None, "What the image is, e.g. CT or MR.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder for pictures, inspection by default; of a data set's card, data_card."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text.")


def main(argv: Sequence[str]) -> None:
    """Flags, then one call."""
    path = argv[1] if len(argv) > 1 else _DATA_DIR.value
    if path is None or (len(argv) > 1 and _DATA_DIR.value):
        raise UserError("give one FILE_OR_FOLDER; see --help")
    if _DATA_DIR.value or _is_data_set(pathlib.Path(path)):
        _print_card(path)
    else:
        _inspect(path)


def _is_data_set(folder: pathlib.Path) -> bool:
    from medsam_jax.data.datasets import RECORD_FILE

    found = (folder / RECORD_FILE).is_file()
    return found or any(folder.glob(f"medical_slices/*/*/{RECORD_FILE}"))


def _print_card(data_dir: str) -> None:
    from medsam_jax.data.datasets import find_dataset

    from .medical_slices import card

    info = find_dataset(data_dir)
    output = pathlib.Path(_OUTPUT.value or "data_card")
    check_writable(output)
    print(card.text(info.record))
    card.draw(info, output / "figures")
    (output / "README.md").write_text(card.text(info.record), encoding="utf-8")
    print(f"wrote {output / 'README.md'} and {output / 'figures'}")


def _inspect(path: str) -> None:
    from . import inspection, inspection_figure

    if line := inspection.other_folder(path):
        raise UserError(line)
    scans, left_out = inspection.find_scans(path)
    if _MASK.value and len(scans) > 1:
        raise UserError(f"--mask: {_MASK.value} is for one image, {path} holds {len(scans)}")
    output = pathlib.Path(_OUTPUT.value or "inspection")
    check_writable(output)
    names = inspection.picture_names(scans)
    described = []
    for scan in progress(scans, "scans") if _JSON.value and len(scans) > 1 else scans:
        inspected = inspection.describe(scan, _MASK.value, _MODALITY.value)
        described.append(inspected.description)
        if not _JSON.value:
            print("\n".join(described[-1].lines()), flush=True)
        if inspected.scan is not None:
            inspection_figure.write_figure(output / names[scan], inspected)
            if not _JSON.value:
                print(f"  picture:     {output / names[scan]}")
    if _JSON.value:
        json.dump([one.to_json() for one in described], sys.stdout, indent=1)
        print()
    elif len(scans) > 1 or left_out:
        print("\n".join(inspection.summary(described, left_out)))
    refused = [one for one in described if one.refused]
    if len(scans) == 1 and refused:
        raise UserError(refused[0].refused)
    if refused:
        raise UserError(f"{path}: {len(refused)} of {len(scans)} scans are refused, named above")


if __name__ == "__main__":
    run(main, positional=1)
