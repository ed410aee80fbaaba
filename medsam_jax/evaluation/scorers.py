"""The checkpoints of an evaluation: what each has seen of the patients, and which it scores.

A checkpoint that was trained or tuned on patients of a test is refused. The models of a
cross-validation score the patients that each has held out, and are pooled under one name.
"""

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from medsam_jax.data.manifest import trained_cases
from medsam_jax.data.splits import SEEN, SPLITS
from medsam_jax.errors import UserError
from medsam_jax.evaluation.base import Evaluation, ObjectScore
from medsam_jax.hub import resolve
from medsam_jax.models.checkpoint import read_config, read_metadata

FOLD = "{}"  # stands for the fold's number in the name of a checkpoint


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A checkpoint and the patients that it scores."""

    name: str  # in tables; folds of one cross-validation share it
    checkpoint: str
    trained_on: dict[str, str]  # case id -> "train" or "tune", of patients scored
    patients: frozenset[str] | None = None  # None: all
    notes: tuple[str, ...] = ()

    def marked(self, rows: Sequence[ObjectScore]) -> list[ObjectScore]:
        """Returns rows under this name, with what the checkpoint has seen."""
        seen = self.trained_on
        return [
            dataclasses.replace(row, checkpoint=self.name, trained_on=seen.get(row.case_id, ""))
            for row in rows
        ]


def by_display_name(items: Sequence[str]) -> dict[str, str]:
    """Returns checkpoints by their names in tables, from the parts of `--checkpoint`.

    A part is `CHECKPOINT`, its own name, or `NAME=CHECKPOINT`. A path that exists is taken as it
    is, also with = in it, or with a comma, which has cut it into two parts.

    Raises:
      UserError: a name or a checkpoint that is empty or given twice.
    """
    named: dict[str, str] = {}
    parts = list(items)
    while parts:
        ends = range(len(parts), 1, -1)
        length = next((end for end in ends if _exists(",".join(parts[:end]))), 1)
        item = ",".join(parts[:length])
        del parts[:length]
        name, place = _split_name(item)
        if not name or not place:
            raise UserError(f"--checkpoint: {item!r}; give CHECKPOINT or NAME=CHECKPOINT")
        if name in named and name != place:
            raise UserError(f"--checkpoint: the name {name!r} is given twice; use another one")
        if place in named.values():
            raise UserError(f"--checkpoint: {','.join(items)} names one twice; leave it out")
        named[name] = place
    return named


def _split_name(item: str) -> tuple[str, str]:
    """Returns display name and checkpoint of a part of `--checkpoint`."""
    name, equals, place = item.partition("=")
    is_path = os.path.lexists(item.replace(FOLD, "1")) or os.sep in name
    return (item, item) if is_path or not equals else (name.strip(), place.strip())


def _exists(item: str) -> bool:
    return os.path.lexists(_split_name(item)[1].replace(FOLD, "1"))


def find_scorers(
    evaluation: Evaluation,
    named: Mapping[str, str],
    split: str | None,
    folds: int = 0,
    include_trained: bool = False,
) -> list[Scorer]:
    """Checks all checkpoints, before hours of work on the first.

    Args:
      named: checkpoints by name in tables; with `folds`, those with `FOLD` in them stand for one of
        each fold.
      split: that is scored; "train" and "tune" may hold what a checkpoint has seen.
      include_trained: whether other splits may, too.

    Raises:
      UserError: a checkpoint that cannot score these data, that has seen patients of a test, or
        folds that do not hold out every patient once.
    """
    _check_names(list(named.values()), folds)
    scorers = []
    for name, place in named.items():
        if FOLD in place:
            parts = [f"{number}/{folds}" for number in range(1, folds + 1)]
            of_folds = [_scorer(evaluation, name, place, fold) for fold in parts]
            _check_folds(evaluation, name, [scorer.patients for scorer in of_folds])
            scorers += of_folds
        else:
            scorers.append(_scorer(evaluation, name, place))
    if not include_trained and split not in SEEN:
        _refuse_seen(evaluation, {one.checkpoint: one.trained_on for one in scorers})
    return scorers


def _trained_on(evaluation: Evaluation, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the split of each patient scored that a checkpoint has seen, by case id.

    A patient is known by its case id, or by an image of its own under any case id.
    """
    cases, images = trained_cases(metadata), trained_cases(metadata, "images")
    patients = evaluation.patients() if cases or images else {}
    seen = {patient: cases[one] for patient, one in patients.items() if one in cases}
    for patient in patients.keys() - seen.keys() if images else ():
        if found := evaluation.image_hashes(patient) & images.keys():
            seen[patient] = images[min(found)]
    return seen


def _scorer(evaluation: Evaluation, name: str, place: str, fold: str = "") -> Scorer:
    """Checks one checkpoint; of a fold, it scores the patients that it has held out."""
    checkpoint = place.replace(FOLD, fold.partition("/")[0])
    directory = resolve(checkpoint)
    contract, metadata = read_config(directory).preprocessing, read_metadata(directory)
    evaluation.check(checkpoint, contract)
    seen, scored = _trained_on(evaluation, metadata), None
    if fold:
        scored = _held_out(evaluation, checkpoint, fold, metadata)
        seen = {patient: split for patient, split in seen.items() if patient in scored}
    notes = [evaluation.window_note(contract)]
    if seen:
        count = len(evaluation.patients() if scored is None else scored)
        notes.append(f"of {count} patients scored, its training had {_counts(seen)}")
    return Scorer(name, checkpoint, seen, scored, tuple(filter(None, notes)))


def _check_names(names: Sequence[str], folds: int) -> None:
    patterns = [name for name in names if FOLD in name]
    if folds and (folds < 2 or not patterns):
        raise UserError(
            f"--folds: {folds} given with --checkpoint {','.join(names)}; give 2 or more, and a "
            f"checkpoint such as runs/fold{FOLD}/best, in which {FOLD} is the number of the fold"
        )
    if patterns and not folds:
        raise UserError(f"--checkpoint: {patterns[0]} has {FOLD}; give --folds=5 or as many")


def _counts(seen: Mapping[str, str]) -> str:
    counts = collections.Counter(seen.values())
    return " and ".join(f"{counts[split]} in {split}" for split in SEEN if counts[split])


def _held_out(
    evaluation: Evaluation, checkpoint: str, fold: str, metadata: Mapping[str, Any]
) -> frozenset[str]:
    """Returns the patients that the checkpoint of a fold has held out, by case id."""
    training = metadata.get("training", {})
    found = training.get("config", {}).get("fold", "")
    if found != fold:
        raise UserError(
            f"{checkpoint}: was trained in fold {found or 'none'}, {fold} is needed; train it with "
            f"--config.fold={fold}"
        )
    held_out = set(training["held_out"])
    return frozenset(patient for patient, one in evaluation.patients().items() if one in held_out)


def _check_folds(
    evaluation: Evaluation, name: str, held_out: Sequence[frozenset[str] | None]
) -> None:
    """Refuses folds unless each patient is held out by one of them."""
    counts = collections.Counter(patient for fold in held_out for patient in fold)
    for problem, wrong in (
        ("no fold", evaluation.patients().keys() - counts.keys()),
        ("several folds", {patient for patient, count in counts.items() if count > 1}),
    ):
        if wrong:
            raise UserError(
                f"--folds: {len(wrong)} of {len(evaluation.patients())} patients are held out by "
                f"{problem} of {name} ({', '.join(sorted(wrong)[:3])}); train all folds on the "
                "data set that is scored"
            )


def _refuse_seen(evaluation: Evaluation, seen: Mapping[str, Mapping[str, str]]) -> None:
    found = {name: patients for name, patients in seen.items() if patients}
    if not found:
        return
    lines = [f"{name} has {_counts(patients)}" for name, patients in found.items()]
    known = {patient for patients in found.values() for patient in patients}
    test = evaluation.patients_of_split(SPLITS[-1])
    remedy = "score other patients"
    if test and not test & known:
        remedy = f"give --split {SPLITS[-1]} ({len(test)} patients, none of them known)"
    raise UserError(
        f"of {len(evaluation.patients())} patients to score, {len(known)} were trained or tuned "
        f"on: {'; '.join(lines)}; {remedy}, or --include_trained to score them all the same"
    )
