"""Training in a fold: its slices, its cached embeddings, what its checkpoint records."""

import numpy as np
import pytest

from medsam_jax.data.augment import Augmentation, Variants
from medsam_jax.data.datasets import find_dataset, open_dataset
from medsam_jax.data.input_pipeline import eval_objects, train_loader
from medsam_jax.data.manifest import case_hash
from medsam_jax.data.splits import ALL, SPLITS
from medsam_jax.errors import UserError
from medsam_jax.evaluation import run
from medsam_jax.inference.engine import Engine
from medsam_jax.models.checkpoint import read_config, read_metadata, read_params
from medsam_jax.training.config import augmentation_of
from medsam_jax.training.embeddings import cached_embeddings
from medsam_jax.training.loop import train_and_evaluate
from medsam_jax.training.setup import set_up
from medsam_jax.training.sharding import make_mesh


def slices(source):
    return [(record["case_id"].decode(), int(record["slice_index"])) for record in source]


def test_a_fold_has_all_slices_of_its_patients(built):
    every, whole = open_dataset(built, ALL)
    held_out = []
    for fold in ("1/3", "2/3", "3/3"):
        found = []
        for split in SPLITS:
            source, info = open_dataset(built, split, fold)
            patients = {c["case_id"] for c in info.record["cases"] if c["split"] == split}
            assert slices(source) == [one for one in slices(every) if one[0] in patients]
            assert info.counts[split]["slices"] == len(source)
            positions, labels = info.objects(split)
            masks = [source[position]["mask"] for position in range(len(source))]
            expected = [(i, n) for i, mask in enumerate(masks) for n in np.unique(mask)[1:]]
            assert list(zip(positions, labels, strict=True)) == expected
            found += slices(source)
            held_out += slices(source) if split == "validation" else []
        assert sorted(found) == sorted(slices(every))
        assert info.fingerprint == find_dataset(built).fingerprint, "one embedding cache for all"
    assert sorted(held_out) == sorted(slices(every))
    assert whole.counts[ALL]["slices"] == len(every)


def test_versions_of_a_slice_are_the_same_in_every_fold(built):
    """Their embeddings are cached once, by the place of a slice in the whole data set."""
    change = Augmentation(flip=0.5, rotation=20.0)
    whole = Variants(open_dataset(built, ALL)[0], change, 2)
    source, info = open_dataset(built, "train", "2/3")
    places = info.stored_positions("train")
    fold = Variants(source, change, 2, places)
    for position, place in enumerate(places):
        for version in (0, 1):
            one, other = fold[2 * position + version], whole[2 * place + version]
            np.testing.assert_array_equal(one["image"], other["image"])


def test_a_run_in_a_fold_keeps_its_patients_apart_and_is_evaluated_on_them(
    config, built, tmp_path, capsys
):
    config.update({"num_steps": 1, "eval_every": 1, "log_every": 1, "checkpoint_every": 1})
    config.embedding_cache = str(tmp_path / "cache")
    for fold in (1, 2):
        config.fold = f"{fold}/2"
        train_and_evaluate(config, tmp_path / f"fold{fold}")
    info = find_dataset(built).in_fold("2/2")
    training = read_metadata(tmp_path / "fold2" / "best")["training"]
    splits = {case["case_id"]: case["split"] for case in info.record["cases"]}
    hashes = {
        split: sorted(case_hash("medical_slices", n) for n, s in splits.items() if s == split)
        for split in SPLITS
    }
    assert training["cases"] == {"train": hashes["train"], "tune": hashes["tune"]}
    assert training["held_out"] == hashes["validation"]

    pattern, output = str(tmp_path / "fold{}" / "best"), tmp_path / "out"
    run.evaluate([pattern], output, data_dir=str(built), folds=2)
    lines = (output / "per_object.csv").read_text().splitlines()[1:]
    assert {line.split(",")[4] for line in lines} == set(splits), "every patient"
    assert len(lines) == len(list(eval_objects(built, ALL, batch_size=1)))
    checkpoint = str(tmp_path / "fold2" / "best")
    with pytest.raises(UserError, match=f"6 patients to score, 3 were .*{checkpoint} has 2 in tr"):
        run.evaluate([checkpoint], tmp_path / "no", data_dir=str(built), split=ALL)


def test_folds_share_the_embeddings_of_augmented_slices(config, built, tmp_path):
    config.update({"num_steps": 2, "eval_every": 2, "log_every": 1, "checkpoint_every": 2})
    config.update({"embedding_cache": str(tmp_path / "cache"), "embedding_variants": 2})
    config.embedding_dtype = "float32"
    config.augmentation.update({"flip": 0.5, "rotation": 20.0})
    files = []
    for fold in ("1/3", "2/3"):
        config.fold = fold
        train_and_evaluate(config, tmp_path / fold[0])
        shards = (tmp_path / "cache").iterdir()
        files.append({path.name: path.stat().st_mtime_ns for path in shards})
    assert files[0] == files[1], "the second fold encodes nothing"

    stored = read_config(config.checkpoint)
    training = set_up(config, stored, make_mesh(config), read_params(config.checkpoint))
    model = training.functional.bind(training.functional.arrays)
    tuning, info = open_dataset(built, "tune", config.fold)
    cached = cached_embeddings(config, training.functional, training.labels, stored, info)
    settings = {"batch_size": 8, "seed": 0, "box_jitter": 0, "fold": config.fold}
    settings |= {"augmentation": augmentation_of(config), "variants": 2}
    batch = next(train_loader(built, "train", embeddings=cached["train"], **settings))
    images, valid = batch["image"], batch["valid_shape"]
    originals = {record["image"].tobytes() for record in open_dataset(built, "train", "2/3")[0]}
    assert 0 < sum(image.tobytes() in originals for image in images) < len(images)
    expected = Engine(model).embed(images, valid)
    np.testing.assert_allclose(batch["embedding"], expected, rtol=1e-4, atol=1e-5)
    images, valid = (np.stack([r[name] for r in tuning]) for name in ("image", "valid_shape"))
    found = np.stack([cached["tune"][position] for position in range(len(tuning))])
    np.testing.assert_allclose(found, Engine(model).embed(images, valid), rtol=1e-4, atol=1e-5)


def test_a_loader_gives_embeddings_of_the_slices_of_its_fold(built):
    source, _ = open_dataset(built, "train", "1/3")
    marks = [np.full((1, 1, 1), n, np.float32) for n in range(len(source))]
    settings = {"batch_size": 4, "seed": 0, "box_jitter": 0}
    batch = next(train_loader(built, "train", embeddings=marks, fold="1/3", **settings))
    for image, mark in zip(batch["image"], batch["embedding"].ravel(), strict=True):
        np.testing.assert_array_equal(image, source[int(mark)]["image"])


def test_more_folds_than_patients_end_before_the_work(config, tmp_path):
    config.fold = "2/7"
    with pytest.raises(UserError, match="config.fold: 2/7 given, but there are 6 patients"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
