"""Measures the time that an evaluation adds to the model: scoring, prompts, reading, saving rows.

    python -m benchmarks.evaluation --data_dir data --checkpoint lite_medsam

The model's time is that of `SlicePredictor` on the same slices and prompts, held in memory; its
masks are dropped. Rounds of both alternate.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags, logging

from medsam_jax.cli import run

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data set written by datasets.build.")
_SPLIT = flags.DEFINE_string("split", "validation", "Its split.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "lite_medsam", "Checkpoint directory or name.")
_SLICES = flags.DEFINE_integer("slices", 32, "Slices to score, at most.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed passes of each.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 1, "Slices at a time.", lower_bound=1)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    from medsam_jax.evaluation import score_slices
    from medsam_jax.evaluation.base import Journal
    from medsam_jax.evaluation.protocol import Protocol
    from medsam_jax.hub import load_model
    from medsam_jax.inference.slice_predictor import SlicePredictor

    with tempfile.TemporaryDirectory() as folder:
        evaluation = score_slices.SplitEvaluation(
            _DATA_DIR.value, _SPLIT.value, [Protocol()], 2.0, _BATCH.value, Path(folder)
        )
        positions = list(evaluation.items().values())[: _SLICES.value]
        model = load_model(_CHECKPOINT.value)
        predictor = SlicePredictor(model, _BATCH.value)
        tasks = [evaluation.task(position)[1] for position in positions]

        def model_alone() -> None:
            for _ in predictor.run(tasks):
                pass

        def evaluate() -> None:
            journal = Journal(Path(folder), {"time": time.time()})
            for entries in evaluation.score(predictor, positions):
                journal.append(entries)

        seconds = {model_alone: [], evaluate: []}
        model_alone()  # compilation, not timed
        for _ in range(_ROUNDS.value):
            for function, found in seconds.items():
                start = time.perf_counter()
                function()
                found.append(time.perf_counter() - start)
    alone, whole = (float(np.median(found)) for found in seconds.values())
    print(
        f"{_CHECKPOINT.value}: {len(positions)} slices, model {alone:.2f} s, "
        f"evaluation {whole:.2f} s: {100 * (whole / alone - 1):+.1f} %"
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("data_dir")
    run(main)
