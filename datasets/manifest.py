"""Writes a manifest for folders of scans and masks, and reports what it could not pair and why.

Examples:
  medsam-jax manifest --images scans --masks segs --modality CT --task liver
  medsam-jax manifest --nnunet Dataset003_Liver
  medsam-jax manifest --npz MedSAM_train/CT_Abd --modality CT --task abdomen
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from medsam_jax.cli import run
from medsam_jax.errors import UserError
from medsam_jax.io.files import check_writable

_IMAGES = flags.DEFINE_string("images", None, "Folder of scans.")
_MASKS = flags.DEFINE_string("masks", None, "Folder of masks; may be the same.")
_NNUNET = flags.DEFINE_string(
    "nnunet", None, "A data set of nnU-Net or the Decathlon, with dataset.json."
)
_NPZ = flags.DEFINE_string("npz", None, "Folder of MedSAM .npz files (imgs, gts, spacing).")
_MODALITY = flags.DEFINE_string(
    "modality", "", "Modality of the scans that do not say theirs: CT, MR, US, ..."
)
_TASK = flags.DEFINE_string("task", "", "What the masks show: liver, sarcoma, ...")
_OUTPUT = flags.DEFINE_string("output", "cases.csv", "The manifest; never overwritten.")


def main(argv: Sequence[str]) -> None:
    """Flags, then one call."""
    del argv
    from .medical_slices import nnunet, pairing

    output = pathlib.Path(_OUTPUT.value)
    if os.path.lexists(output):
        raise UserError(f"{output}: is there already; choose another --output")
    check_writable(output.parent)
    sources = [_IMAGES.value or _MASKS.value, _NNUNET.value, _NPZ.value]
    if sum(source is not None for source in sources) != 1:
        raise UserError("give --images with --masks, or --nnunet, or --npz; see --help")
    if _NNUNET.value is None and not _TASK.value:
        raise UserError("--task is needed, e.g. --task liver")
    if _NPZ.value is not None and not _MODALITY.value:
        raise UserError("--modality is needed, e.g. --modality CT")
    if _NNUNET.value is not None:
        found = nnunet.read_nnunet(pathlib.Path(_NNUNET.value), _TASK.value, _MODALITY.value)
    elif _NPZ.value is not None:
        found = pairing.read_npz(pathlib.Path(_NPZ.value), _MODALITY.value, _TASK.value)
    elif _IMAGES.value is None or _MASKS.value is None:
        raise UserError("--images and --masks belong together; they may be the same folder")
    else:
        found = pairing.pair_folders(
            pathlib.Path(_IMAGES.value), pathlib.Path(_MASKS.value), _MODALITY.value, _TASK.value
        )
    for line in found.problems:
        print(f"not paired: {line}", file=sys.stderr)
    for line in found.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if not found.rows:
        raise UserError(f"no image has a mask: {len(found.problems)} files are listed above")
    if unknown := [row[1] for row in found.rows if not row[3]]:
        raise UserError(f"{unknown[0]}: does not say its modality; give e.g. --modality CT")
    pairing.write_manifest(output, found.rows, found.ignore)
    for line in found.notes:
        print(line)
    print(f"wrote {_OUTPUT.value}: {len(found.rows)} cases, {len(found.problems)} files not paired")


if __name__ == "__main__":
    run(main)
