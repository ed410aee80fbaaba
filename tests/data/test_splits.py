"""Splits of few cases, and folds: nobody is trained on and tested on."""

import collections
import itertools

import pytest

from medsam_jax.data.splits import SPLITS, assign_splits, fold_splits, parse_fold, split_of
from medsam_jax.errors import UserError


def splits_of(names, **named):
    return assign_splits("d", dict.fromkeys(names, "") | named)


def test_no_split_is_empty_from_three_patients_on():
    for start in range(0, 400, 4):
        for count in (3, 4, 5, 8):
            names = [f"c{start + n}" for n in range(count)]
            assert set(splits_of(names).values()) == set(SPLITS)
    assert splits_of(["a", "b"]) == {name: split_of("d", name) for name in ("a", "b")}


def test_large_data_sets_keep_the_hash():
    names = [f"c{n}" for n in range(300)]
    assert splits_of(names) == {name: split_of("d", name) for name in names}


def test_adding_cases_moves_nobody_that_was_trained_or_tuned_on_into_the_test():
    """From tune or train nobody comes to validation, and from train nobody to tune."""
    moved = collections.Counter()
    for start in range(0, 4000, 20):
        names = [f"c{start + n}" for n in range(20)]
        natural = [split_of("d", name) for name in names[:4]]
        if natural.count("train") < 2:
            continue  # the stated exception
        growing = [splits_of(names[:count]) for count in range(4, 21)]
        for before, after in itertools.pairwise(growing):
            moved.update((split, after[name]) for name, split in before.items())
    assert not moved["train", "validation"] + moved["tune", "validation"] + moved["train", "tune"]
    assert min(moved["validation", "tune"], moved["tune", "train"]) > 10, "others give way"


def test_cases_that_the_manifest_places_stay_and_count():
    names = [n for n in map("c{}".format, range(99)) if split_of("d", n) == "train"][:4]
    found = splits_of(names, x="validation", y="tune")
    assert found == dict.fromkeys(names, "train") | {"x": "validation", "y": "tune"}
    placed = dict.fromkeys("abcd", "train")
    assert assign_splits("d", placed) == placed


@pytest.mark.parametrize(("patients", "count"), [(3, 3), (4, 2), (5, 5), (10, 3), (17, 5), (50, 5)])
def test_folds_hold_out_every_patient_once(patients, count):
    names = [f"p{n}" for n in range(patients)]
    folds = [fold_splits("d", names, f"{n + 1}/{count}") for n in range(count)]
    held_out = [[n for n in names if fold[n] == "validation"] for fold in folds]
    assert sorted(itertools.chain(*held_out)) == sorted(names)
    assert max(map(len, held_out)) - min(map(len, held_out)) <= 1
    for fold in folds:
        sizes = collections.Counter(fold.values())
        assert sizes["tune"] == max(1, min(round(patients / 10), min(map(len, held_out))))
        assert sizes["train"] >= 1
    assert folds == [fold_splits("d", names[::-1], f"{n + 1}/{count}") for n in range(count)]


@pytest.mark.parametrize("fold", ["", "2", "0/5", "6/5", "1/1", "a/b", "-1/5"])
def test_a_malformed_fold_is_refused(fold):
    with pytest.raises(UserError, match=f"config.fold: '{fold}' given; write e.g. 2/5"):
        parse_fold(fold)


def test_more_folds_than_patients_are_refused():
    message = "config.fold: 2/5 given, but there are 4 patients; use 4 folds or fewer"
    with pytest.raises(UserError, match=message):
        fold_splits("d", "abcd", "2/5")
    for patients in ("ab", "abc"):
        with pytest.raises(UserError, match=f"there are {len(patients)} patients"):
            fold_splits("d", patients, "1/2")
