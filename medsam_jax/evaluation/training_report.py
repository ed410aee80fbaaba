"""Reports a training run in one HTML file: scores before and after, curves, worst pictures.

Both models are scored on patients that the run neither trained on nor chose its best step by. The
scores are kept in the workdir's `report/`, so a report that is written again scores nothing twice.
"""

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsam_jax.data.datasets import DatasetInfo, find_dataset
from medsam_jax.data.splits import SEEN, SPLITS
from medsam_jax.distributed import wait_for_all
from medsam_jax.drawing import LEGEND
from medsam_jax.errors import UserError, disk_space
from medsam_jax.evaluation import page, plots
from medsam_jax.evaluation.base import ObjectScore, draw_object
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.evaluation.score_slices import SplitEvaluation
from medsam_jax.evaluation.statistics import count_cases, grouped, summarise
from medsam_jax.io.files import write_text
from medsam_jax.models.checkpoint import read_config
from medsam_jax.training.config import base_config
from medsam_jax.training.monitor import read_metrics
from medsam_jax.training.workdir import describe_best, finished_run

MOST_SLICES = 32  # scored
_WORST = 6  # objects drawn, of each prompt


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows of the same objects by two models, in the same order."""

    evaluation: SplitEvaluation
    before: list[ObjectScore]
    after: list[ObjectScore]

    @property
    def means(self) -> tuple[float, float]:
        """Mean DSC over objects, before and after."""
        before, after = ([row.scores["dice"] for row in s] for s in (self.before, self.after))
        return float(np.mean(before)), float(np.mean(after))

    def pictures(self, row: ObjectScore) -> str:
        """Draws an object, a row of `after`, as the models saw it and as each segmented it."""
        pair = [self.before[self.after.index(row)], row]
        scores = [
            f"{metric} {' to '.join(f'{one.scores[name]:.3f}' for one in pair)}"
            for metric, name in (("DSC", "dice"), ("NSD", "nsd"))
        ]
        where = f"{row.case_id}, {row.task} {row.label_name}, slice {row.slice_index}"
        images = draw_object(*self.evaluation.show(row), pair)
        return page.pictures(images, f"{where}: {', '.join(scores)}")


def write_report(workdir: Path) -> None:
    """Writes `report.html` into the workdir of a finished run, in process 0, and prints its path.

    Several processes share the scoring; all call this.

    Raises:
      UserError: there is no run, it was interrupted, or its data set is not there or another one.
    """
    wait_for_all("finished training")  # process 0 writes the last files of a run
    start = finished_run(workdir)
    config = start["config"]
    info = find_dataset(config["data_dir"]).in_fold(config["fold"])
    if info.fingerprint != start["data_set"]["sha256"]:
        raise UserError(
            f"{info.directory}: not the data set that {workdir} was trained on; build that again, "
            "or train in another --workdir"
        )
    scored = _score(workdir, config, split_to_report(info, config["task"]))
    if jax.process_index() != 0:
        return
    target = workdir / "report.html"
    title = f"Training run {workdir.resolve().name}"
    with disk_space(target):
        write_text(target, page.page(title, _sections(workdir, start, scored)))
    print(target.absolute())


def split_to_report(info: DatasetInfo, task: str) -> str:
    """Returns "validation", or "tune" where no patient was left for it."""
    held_out = [case for case in info.record["cases"] if case["split"] == SPLITS[-1]]
    objects = [any(case["objects"]) for case in held_out if task in ("", case["task"])]
    return SPLITS[-1] if any(objects) else SEEN[-1]


def _score(workdir: Path, config: Mapping[str, Any], split: str) -> dict[str, Comparison]:
    """Scores the model that the run started from, under the run's contract, and its best one.

    Returns:
      Comparisons by prompt: the box, and one point if points were trained.
    """
    prompts = ("box", "point") if config["point_share"] else ("box",)
    evaluation = SplitEvaluation(
        config["data_dir"],
        split,
        [Protocol(prompt) for prompt in prompts],
        config["tolerance"],
        None,
        workdir / "report",
        fold=config["fold"],
        task=config["task"],
        most=MOST_SLICES,
    )
    best = workdir / "best"
    print(f"scoring {config['checkpoint']} and {best} for the report", flush=True)
    before = evaluation.evaluate(config["checkpoint"], model_config=read_config(best))
    after = evaluation.evaluate(str(best))

    def compare(prompt: str) -> Comparison:
        pair = ([row for row in rows if row.prompt == prompt] for rows in (before, after))
        return Comparison(evaluation, *pair)

    return {prompt: compare(prompt) for prompt in prompts}


def _sections(
    workdir: Path, start: Mapping[str, Any], scored: Mapping[str, Comparison]
) -> Iterable[str]:
    config, best = start["config"], start["best"]
    metrics = read_metrics(workdir / "metrics.csv")
    for prompt, comparison in scored.items():
        yield page.paragraph(headline(comparison, f"by {prompt}"))
    if best["no_better_than_the_start"]:
        yield page.paragraph("No step scored better than the start: best/ is the untrained model.")
    yield "<h2>Before and after</h2>"
    yield score_table(scored, "prompt")
    yield from _what_was_scored(workdir, config, next(iter(scored.values())))
    yield "<h2>Curves</h2>"
    yield page.plot(
        plots.training_curves(metrics, best.get("step")), "Training loss and tune split by step"
    )
    yield page.preformatted(shlex.join(["tensorboard", "--logdir", str(workdir / "tensorboard")]))
    yield "<h2>Worst objects</h2>"
    yield page.paragraph(
        f"The slice as the models saw it, before, after: {LEGEND}. Of each patient and label the "
        f"object with the lowest DSC after training, {_WORST} at most, the lowest first."
    )
    for prompt, comparison in scored.items():
        yield f"<h3>By {prompt}</h3>" if len(scored) > 1 else ""
        yield from map(comparison.pictures, worst(comparison.after)[:_WORST])
    yield "<h2>Run</h2>"
    yield page.table(("", "value"), _facts(start, metrics))
    yield "<h2>Data</h2>"
    yield data_table(next(iter(scored.values())).evaluation.info, config["task"])
    yield "<h2>Configuration</h2>"
    yield page.paragraph("Fields that differ from their defaults:")
    yield page.preformatted(_changed(config))


def headline(comparison: Comparison, where: str) -> str:
    """Returns in one sentence how the mean DSC changed."""
    before, after = comparison.means
    pairs = zip(comparison.before, comparison.after, strict=True)
    better = sum(new.scores["dice"] > old.scores["dice"] for old, new in pairs)
    verb = "raised" if after > before else "did not raise"
    return (
        f"Training {verb} the mean DSC {where}: {before:.4f} before, {after:.4f} after; "
        f"{better} of {len(comparison.after)} objects are better."
    )


def score_table(scored: Mapping[str, Comparison], kind: str) -> str:
    """Returns a table of mean scores by task and modality; `kind` heads the mapping's names."""
    headings = [kind, "task", "modality", "patients", "objects"]
    headings += ["DSC before", "after", "NSD before", "after"]
    rows = []
    for name, one in scored.items():
        for old, new in zip(summarise(one.before), summarise(one.after), strict=True):
            means = [row[f"{metric}_mean"] for metric in ("dice", "nsd") for row in (old, new)]
            numbers = [f"{value:.4f}" for value in means]
            rows.append([name, new["task"], new["modality"], new["cases"], new["n"], *numbers])
    return page.table(headings, rows)


def data_table(info: DatasetInfo, task: str = "") -> str:
    """Returns patients, slices and objects by split, task and modality."""
    cases = [case for case in info.record["cases"] if task in ("", case["task"])]
    groups = grouped(cases, itemgetter("split", "task", "modality"))
    rows = [
        [
            *key,
            len({case["case_id"] for case in members}),
            sum(case["slices"] for case in members),
            sum(len(kept) for case in members for kept in case["objects"]),
        ]
        for key, members in sorted(groups.items(), key=lambda item: SPLITS.index(item[0][0]))
    ]
    return page.table(("split", "task", "modality", "patients", "slices", "objects"), rows)


def worst(rows: Sequence[ObjectScore]) -> list[ObjectScore]:
    """Returns the object with the lowest DSC of each patient and label, the lowest first."""
    groups = grouped(rows, attrgetter("case_id", "task", "modality", "label"))
    lowest = [min(members, key=lambda row: row.scores["dice"]) for members in groups.values()]
    return sorted(lowest, key=lambda row: row.scores["dice"])


def _what_was_scored(
    workdir: Path, config: Mapping[str, Any], comparison: Comparison
) -> Iterable[str]:
    rows, evaluation = comparison.after, comparison.evaluation
    patients = count_cases(rows)
    slices, whole = len(evaluation.items()), evaluation.slices
    text = (
        f"Means over the objects of {slices} of {whole} slices, evenly from each patient of the "
        f"{evaluation.split} split ({patients}); exact prompts from the truth, NSD at "
        f"{config['tolerance']:g} pixels. "
    )
    if evaluation.split in SEEN:
        yield page.paragraph(
            text + "No patient was left for a validation split, and the best step was chosen by "
            "these: the scores are no test. Cross-validate (config.fold), or add patients."
        )
        return
    yield page.paragraph(
        text + "The run neither trained on these patients nor chose its best step by them."
    )
    if config["fold"]:
        yield page.paragraph(
            "python -m medsam_jax.evaluate --folds pools the folds once all are trained."
        )
        return
    best = str(workdir / "best")
    both = best if config["preprocessing"] else f"{config['checkpoint']},{best}"
    flags = ["--checkpoint", both, "--data_dir", config["data_dir"]]
    flags += ["--split", evaluation.split, "--output", str(workdir / "evaluation")]
    yield page.paragraph("All slices, with intervals, tests and figures:")
    yield page.preformatted(f"python -m medsam_jax.evaluate {shlex.join(flags)}")


def _facts(start: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    config, devices = start["config"], start["devices"]
    return [
        ("started from", config["checkpoint"]),
        ("result", describe_best(start["best"])),
        ("steps", f"{metrics['train/loss'][-1][0]} of {config['num_steps']}"),
        ("data set", f"{start['data_set']['directory']}, {start['data_set']['sha256'][:12]}"),
        ("fold", config["fold"] or "none: the splits of the data set"),
        ("devices", f"{devices['count']} x {devices['kind']}"),
        ("versions", ", ".join(f"{name} {one}" for name, one in start["versions"].items())),
    ]


def _changed(config: Mapping[str, Any]) -> str:
    defaults = json.loads(base_config().to_json_best_effort())
    changed = {name: one for name, one in config.items() if one != defaults.get(name)}
    return "\n".join(f"{name} = {json.dumps(one)}" for name, one in changed.items())
