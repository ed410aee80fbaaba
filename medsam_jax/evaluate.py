"""Scores checkpoints on a data set: DSC, NSD, IoU, HD95 and ASD per object, tables and figures.

Example:
  python -m medsam_jax.evaluate --checkpoint lite_medsam,runs/demo/best --data_dir data/demo \\
      --split validation --output results/demo

All checkpoints answer the same prompts. The same command goes on after a kill.
"""

from pathlib import Path

from absl import flags, logging

from medsam_jax import errors

_CHECKPOINT = flags.DEFINE_list(
    "checkpoint", None, "Checkpoint directories or names of known weights, comma-separated."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data set written by datasets.build.")
_SPLIT = flags.DEFINE_string("split", "validation", "Split of the data set.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for tables and figures.")
_PROMPT = flags.DEFINE_string(
    "prompt", "box", "Prompt made from the truth: box, point (one) or points (three on, three off)."
)
_BOX_SHIFT = flags.DEFINE_list(
    "box_shift",
    "0",
    "Each box side moves outwards by 0 to this many pixels; several give a curve, e.g. 0,5,10,20. "
    "The first makes the main tables.",
)
_TOLERANCE = flags.DEFINE_float("tolerance", 2.0, "Of the NSD: pixels of the stored slice.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Slices at a time.")
_SEED = flags.DEFINE_integer("seed", 0, "Of box shifts and points.")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    from medsam_jax.evaluation.run import evaluate

    evaluate(
        checkpoints=_CHECKPOINT.value,
        data_dir=_DATA_DIR.value,
        split=_SPLIT.value,
        output=Path(_OUTPUT.value),
        prompt=_PROMPT.value,
        box_shifts=_BOX_SHIFT.value,
        tolerance=_TOLERANCE.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "data_dir", "output"])
    errors.run(main)
