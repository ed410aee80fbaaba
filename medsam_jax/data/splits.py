"""Decides the split or the fold of each patient by a seeded hash of data set and case id."""

import collections
import hashlib
import re
from collections.abc import Iterable, Mapping

from medsam_jax.errors import UserError

SPLITS = ("train", "tune", "validation")
SEEN = ("train", "tune")  # splits that a training run sees
ALL = "all"  # stands for the slices of every split
_ENOUGH = 3  # patients from which on no split is left empty


def split_of(data_set: str, case_id: str, seed: int = 0) -> str:
    """Returns a split, 80/10/10, by a hash of data set, case id and seed: new cases move nobody."""
    fraction = _fraction(f"{seed}|{data_set}|{case_id}")
    return "train" if fraction < 0.8 else "tune" if fraction < 0.9 else "validation"


def assign_splits(data_set: str, named: Mapping[str, str]) -> dict[str, str]:
    """Returns the split of each case id; of three patients or more no split is empty.

    The hash decides (`split_of`). Then an empty validation split gets the free case with the
    highest hash, and an empty tune split the highest of the rest. A further case can only lower
    the rank of the others, so it moves cases from validation to tune or train, never back. Where
    the last training case would have to go, the lowest case of a later split fills the gap; such a
    case may move back when cases are added (3 % of data sets of three patients, 0.1 % of five).

    Args:
      data_set: its name enters the hash.
      named: the split that the manifest names for each case id, "" for a free case.
    """
    splits = {case_id: split or split_of(data_set, case_id) for case_id, split in named.items()}
    free = [case_id for case_id, split in named.items() if not split]
    free.sort(key=lambda case_id: _fraction(f"0|{data_set}|{case_id}"))
    for empty in reversed(SPLITS) if len(named) >= _ENOUGH else ():
        sizes = collections.Counter(splits.values())
        if sizes[empty]:
            continue
        place = SPLITS.index(empty)
        spared = [c for c in free if splits[c] != SPLITS[0] or sizes[SPLITS[0]] > 1]
        below = [c for c in spared if SPLITS.index(splits[c]) < place]
        above = [c for c in free if SPLITS.index(splits[c]) > place and sizes[splits[c]] > 1]
        if below or above:
            splits[below[-1] if below else above[0]] = empty
    return splits


def parse_fold(fold: str) -> tuple[int, int]:
    """Returns number and count of a fold such as "2/5". Raises UserError."""
    found = re.fullmatch(r"(\d+)/(\d+)", fold)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not (count >= 2 and 1 <= number <= count):
        raise UserError(f"config.fold: {fold!r} given; write e.g. 2/5, the second of five folds")
    return number, count


def fold_splits(data_set: str, case_ids: Iterable[str], fold: str) -> dict[str, str]:
    """Returns the split of each patient in a fold of a cross-validation.

    Patients in the order of a hash are dealt to the folds, so that sizes differ by one at most.
    The fold's own patients are held out as "validation". The first ones of the next fold, a tenth
    of all patients and at least one, are "tune"; the rest is "train".

    Raises:
      UserError: `fold` is malformed, there are more folds than patients, or a fold leaves too few.
    """
    number, count = parse_fold(fold)
    order = sorted(set(case_ids), key=lambda case_id: _fraction(f"fold|{data_set}|{case_id}"))
    if count > len(order) or len(order) - len(order[::count]) < len(SEEN):
        remedy = f"use {len(order)} folds or fewer, such that two patients remain to train and tune"
        raise UserError(f"config.fold: {fold} given, but there are {len(order)} patients; {remedy}")
    splits = dict.fromkeys(order, "train")
    tenth = max(1, round(len(order) / 10))
    next_fold = order[number % count :: count]
    splits |= dict.fromkeys(next_fold[:tenth], "tune")
    return splits | dict.fromkeys(order[number - 1 :: count], "validation")


def _fraction(text: str) -> float:
    """Returns a number in [0, 1), evenly spread over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
