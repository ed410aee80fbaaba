"""Builds a TFDS data set of slices from a manifest of scans and masks.

The default recipe is that of LiteMedSAM, from which training starts by default.

Example:
  medsam-jax build --manifest cases.csv --data_dir data --num_workers 4
"""

from collections.abc import Sequence

from absl import flags, logging

from medsam_jax.cli import loading, run
from medsam_jax.data.recipes import DEFAULT_RECIPE, RECIPES
from medsam_jax.errors import UserError

_MANIFEST = flags.DEFINE_string(
    "manifest", None, "CSV file: case_id,image,mask,modality,task[,split][,window].", required=True
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where data sets are kept.", required=True)
_RECIPE = flags.DEFINE_enum(
    "recipe", DEFAULT_RECIPE, list(RECIPES), "MedSAM v1 or v2, LiteMedSAM, or SAM's own resize."
)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", 1, "Processes; their number does not change the files."
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error",
    "fail",
    ["fail", "skip"],
    "Rows that cannot be used: stop, or list them and continue.",
)
_LABELS = flags.DEFINE_string(
    "labels", "", "Labels to keep and their names: [task:]id[=name],..., e.g. 1=liver,2=tumour."
)
_INSTANCES = flags.DEFINE_integer(
    "instances", None, "Label whose connected parts become separate objects (lesions)."
)
_AXIS = flags.DEFINE_enum(
    "axis", None, ["z", "y", "x"], "Array axis to slice along; found from the spacing by default."
)
_NAME = flags.DEFINE_string(
    "name", "medical_slices", "Name of the data set: with the case id it decides the split."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Build again; the earlier data set stays until the new one is whole."
)
_BEAM_RUNNER = flags.DEFINE_string(
    "beam_runner", None, "Build under Apache Beam, e.g. DirectRunner."
)
_BEAM_OPTIONS = flags.DEFINE_list(
    "beam_options", [], "Options of the Beam pipeline, comma-separated."
)


def main(argv: Sequence[str]) -> None:
    """Flags, then one call."""
    del argv
    logging.set_verbosity(logging.WARNING)  # TFDS reports each folder that it opens
    with loading():
        from .medical_slices import building, slices

    if _NUM_WORKERS.value < 0:
        raise UserError(f"--num_workers: {_NUM_WORKERS.value} is negative; use 0 or more")
    options = slices.Options(
        recipe=_RECIPE.value,
        axis=None if _AXIS.value is None else "zyx".index(_AXIS.value),
        instances=_INSTANCES.value,
        labels=slices.parse_labels(_LABELS.value),
    )
    request = building.Request(
        manifest=_MANIFEST.value,
        data_dir=_DATA_DIR.value,
        options=options,
        name=_NAME.value,
        num_workers=_NUM_WORKERS.value,
        on_error=_ON_ERROR.value,
        overwrite=_OVERWRITE.value,
        beam_runner=_BEAM_RUNNER.value,
        beam_options=tuple(_BEAM_OPTIONS.value),
    )
    built = building.build(request)
    print(f"built {built}\n{building.report(built, request.data_dir)}")


if __name__ == "__main__":
    run(main)
