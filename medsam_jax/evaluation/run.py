"""Runs an evaluation: `python -m medsam_jax.evaluate` as a function."""

from collections.abc import Sequence
from pathlib import Path

import jax

from medsam_jax.data.datasets import data_set_of
from medsam_jax.data.splits import ALL
from medsam_jax.errors import UserError, disk_space
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.evaluation.report import write_report
from medsam_jax.evaluation.score_scans import VolumeEvaluation
from medsam_jax.evaluation.score_slices import SplitEvaluation
from medsam_jax.evaluation.scorers import by_display_name, find_scorers
from medsam_jax.io.files import check_writable


def evaluate(
    checkpoints: Sequence[str],
    output: Path,
    *,
    data_dir: str | None = None,
    manifest: str | None = None,
    split: str | None = None,
    name: str | None = None,
    prompt: str = "box",
    box_shifts: Sequence[int | str] = (0,),
    labels: Sequence[int | str] = (),
    with_burden: bool = False,
    tolerance: float = 2.0,
    batch_size: int | None = None,
    seed: int = 0,
    folds: int = 0,
    include_trained: bool = False,
) -> None:
    """Evaluates checkpoints side by side and writes tables and figures to `output`.

    See `medsam_jax.evaluate` and `Evaluation` for the arguments. Raises UserError for bad
    arguments, data, manifest or checkpoint, before any work where possible.
    """
    protocols = [Protocol(prompt, _whole("box_shift", shift), seed) for shift in box_shifts]
    _check_arguments(checkpoints, protocols, tolerance, batch_size)
    named = by_display_name(checkpoints)
    settings = protocols, tolerance, batch_size, output
    if folds and split:
        raise UserError(f"--split: {split} given, but --folds scores every patient; leave it out")
    if (data_dir is None) == (manifest is None):
        raise UserError("--data_dir, --manifest: give one of them")
    if manifest is None:
        if labels or with_burden:
            raise UserError("--labels, --burden: work with --manifest; leave them out")
        split = ALL if folds else split or "validation"
        evaluation = SplitEvaluation(data_dir, split, *settings)
    else:
        names = _labels(labels)
        more = {"labels": list(names), "label_names": names, "with_burden": with_burden}
        more["data_set"] = name or data_set_of(manifest)
        evaluation = VolumeEvaluation(manifest, split, *settings, **more)
    check_writable(output)
    scorers = find_scorers(evaluation, named, split, folds, include_trained)
    for scorer in scorers:
        for note in scorer.notes:
            print(f"note: {scorer.checkpoint}: {note}", flush=True)
    rows = []
    for one in scorers:
        print(f"scoring {one.checkpoint}", flush=True)
        start = len(evaluation.slice_rows)
        rows += one.marked(evaluation.evaluate(one.checkpoint, one.patients))
        evaluation.slice_rows[start:] = one.marked(evaluation.slice_rows[start:])
    rows += evaluation.evaluate_annotators()
    if jax.process_index() != 0:
        return
    facts = {
        "checkpoints": ", ".join(
            f"`{place}`" if name == place else f"{name} (`{place}`)"
            for name, place in named.items()
        ),
        "prompt": f"{prompt}, seed {seed}",
        "scored": evaluation.scoring,
        "NSD tolerance": f"{tolerance:g} {evaluation.unit}",
        **{f"`{one.checkpoint}`": "; ".join(one.notes) for one in scorers if one.notes},
    }
    print(f"writing tables and figures to {output}", flush=True)
    with disk_space(output):
        write_report(evaluation, rows, facts)
    print((output / "summary.md").absolute())


def _labels(given: Sequence[int | str]) -> dict[int, str]:
    """Reads `--labels`: `id` or `id=name`; returns names ("" for none) by label."""
    pairs = [str(label).partition("=") for label in given]
    labels = {_whole("labels", number): name.strip() for number, _, name in pairs}
    if len(labels) < len(pairs) or any(label <= 0 for label in labels):
        raise UserError(
            f"--labels: {','.join(map(str, given))} given; use numbers above 0, each once"
        )
    return labels


def _whole(flag: str, value: int | str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"--{flag}: {value!r} is no whole number") from None


def _check_arguments(
    checkpoints: Sequence[str],
    protocols: Sequence[Protocol],
    tolerance: float,
    batch_size: int | None,
) -> None:
    if not checkpoints or not all(checkpoints):
        raise UserError("--checkpoint: empty; give directories or names, comma-separated")
    if len({protocol.box_shift for protocol in protocols}) < len(protocols):
        raise UserError("--box_shift: one value is given twice; leave it out")
    if not 0 <= tolerance < float("inf"):
        raise UserError(f"--tolerance: {tolerance} given; use 0 or more (pixels or mm)")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size: {batch_size} given; use 1 or more")
