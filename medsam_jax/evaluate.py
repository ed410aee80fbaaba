"""Scores checkpoints on a data set or on scans: DSC, NSD, IoU, HD95, ASD, tables and figures.

Examples:
  python -m medsam_jax.evaluate --checkpoint lite_medsam,runs/demo/best --data_dir data/demo \\
      --split validation --output results/demo
  python -m medsam_jax.evaluate --checkpoint lite_medsam --manifest cases.csv --burden \\
      --output results/volumes
  python -m medsam_jax.evaluate --checkpoint 'runs/fold{}/best' --folds 5 --data_dir data \\
      --output results/folds

A data set is scored slice by slice (2D, pixels), the scans of a manifest as volumes in their own
grid (3D, mm); `mask_NAME` columns of the manifest hold further annotators.

All checkpoints get the same prompts. After a kill the same command continues. On several hosts
start every process with --multihost (see docs/training.md); `--output` must be on a disk that all
of them see, and process 0 writes the tables.
"""

from pathlib import Path

from absl import flags, logging

from medsam_jax import cli
from medsam_jax.distributed import define_flags
from medsam_jax.io.files import keep_compiled_programs

_CHECKPOINT = flags.DEFINE_list(
    "checkpoint",
    None,
    "Checkpoint directories or names of known weights, comma-separated; NAME=CHECKPOINT gives one "
    "another name in tables and figures.",
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data set written by datasets.build.")
_MANIFEST = flags.DEFINE_string("manifest", None, "cases.csv of scans, instead of a data set.")
_SPLIT = flags.DEFINE_string(
    "split", None, "Split to score; by default validation of a data set, all rows of a manifest."
)
_NAME = flags.DEFINE_string(
    "name",
    None,
    "Of a manifest's data set, as datasets.build got it: it decides the split. By default that of "
    "the data set that the manifest lies in, else medical_slices.",
)
_FOLDS = flags.DEFINE_integer(
    "folds",
    0,
    "Folds of a cross-validation: each --checkpoint with {} in its name is one of every fold and "
    "scores the patients that it has held out; the tables pool them.",
)
_INCLUDE_TRAINED = flags.DEFINE_bool(
    "include_trained", False, "Score patients that a checkpoint was trained or tuned on, too."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for tables and figures.")
_PROMPT = flags.DEFINE_string(
    "prompt", "box", "Prompt made from the truth: box, point (one) or points (three on, three off)."
)
_BOX_SHIFT = flags.DEFINE_list(
    "box_shift",
    "0",
    "Each box side moves outwards by 0 to this many pixels; several give a curve, e.g. 0,5,10,20. "
    "The first one makes the main tables.",
)
_LABELS = flags.DEFINE_list(
    "labels",
    [],
    "Labels to score, which every scan must have, with names where wanted: 1=liver,2=tumour.",
)
_BURDEN = flags.DEFINE_bool("burden", False, "Measure volumes and diameters in the scans.")
_TOLERANCE = flags.DEFINE_float("tolerance", 2.0, "Of the NSD: pixels for slices, mm for volumes.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Slices at a time; by default 8, on a CPU 1, where more gain nothing."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of box shifts and points.")
_JOIN_PROCESSES = define_flags()


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    with cli.loading():
        keep_compiled_programs()
        from medsam_jax.evaluation.run import evaluate

    _JOIN_PROCESSES()
    evaluate(
        checkpoints=_CHECKPOINT.value,
        output=Path(_OUTPUT.value),
        data_dir=_DATA_DIR.value,
        manifest=_MANIFEST.value,
        split=_SPLIT.value,
        name=_NAME.value,
        prompt=_PROMPT.value,
        box_shifts=_BOX_SHIFT.value,
        labels=_LABELS.value,
        with_burden=_BURDEN.value,
        tolerance=_TOLERANCE.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
        folds=_FOLDS.value,
        include_trained=_INCLUDE_TRAINED.value,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "output"])
    cli.run(main)
