"""The embedding cache: goes on where it stopped, refuses by name, says that a disk is full.

Embeddings here are the mean colour of a slice, so that each tells which slice it is of.
"""

import dataclasses

import numpy as np
import pytest

from medsam_jax.data import embedding_cache
from medsam_jax.data.augment import Augmentation, Variants
from medsam_jax.data.datasets import open_dataset
from medsam_jax.data.input_pipeline import train_loader
from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.errors import UserError

KEY = {"encoder weights": "a", "preprocessing": {}, "data set": "b", "shape": [1, 1, 3]}
KEY |= {"dtype": "float32"}


@pytest.fixture
def build(built, tmp_path, monkeypatch):
    """Builds the training split in shards of four slices; tells how many slices were encoded."""
    monkeypatch.setattr(embedding_cache, "SLICES_PER_SHARD", 4)
    encoded = []

    def encode(images, valid_shape):
        encoded.append(len(images))
        return images.mean(axis=(1, 2), keepdims=True).astype(np.float32)

    def run(records=None, **changes):
        encoded.clear()
        records = open_dataset(built, "train")[0] if records is None else records
        directory = tmp_path / "cache"
        made = embedding_cache.open_or_build(directory, KEY | changes, records, "train", encode, 2)
        return made, sum(encoded)

    return run


def test_embeddings_are_those_of_the_slices_in_order(build, built):
    made, encoded = build()
    records, _ = open_dataset(built, "train")
    assert len(made) == len(records) > 8
    assert encoded >= len(records)
    for position in (0, 3, 4, len(records) - 1):
        expected = records[position]["image"].mean(axis=(0, 1), keepdims=True)
        np.testing.assert_array_equal(made[position], expected.astype(np.float32))


def test_variants_come_with_their_own_picture_mask_and_embedding(build, built):
    """Over an epoch of all variants: the cached one belongs to the picture, unchanged ones too."""
    records, _ = open_dataset(built, "train")
    flips = Augmentation(flip=0.5, intensity=0.1)
    made, _ = build(Variants(records, flips, 3))
    assert len(made) == 3 * len(records)
    settings = {"batch_size": 3, "seed": 0, "box_jitter": 0}
    loader = train_loader(
        built, "train", augmentation=flips, embeddings=made, variants=3, **settings
    )
    unchanged = {record["image"].tobytes() for record in records}
    seen, as_stored = set(), 0
    for _ in range(len(records)):
        batch = next(loader)
        mean = batch["image"].mean(axis=(1, 2), keepdims=True, dtype=np.float64)
        np.testing.assert_allclose(batch["embedding"], mean, rtol=1e-5)
        for image, mask, box in zip(batch["image"], batch["mask"], batch["box"], strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
            as_stored += image.tobytes() in unchanged
            seen.add(image.tobytes())
    assert as_stored >= len(records), "each slice as stored, once an epoch"
    assert len(seen) > 2 * len(records)


def test_variants_need_what_makes_them(built):
    with pytest.raises(UserError, match="variants: 2; several need embeddings and augmentation"):
        train_loader(built, "train", batch_size=1, seed=0, box_jitter=0, variants=2)


def test_a_stopped_pass_goes_on(build, tmp_path):
    whole = values(build()[0])
    shards = sorted((tmp_path / "cache").glob("*.array_record"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    shards[1].with_name(f".partial-{shards[1].name}").write_bytes(content[: len(content) // 2])
    made, encoded = build()
    assert encoded == 4, "one shard is missing"
    assert values(made) == whole
    assert build()[1] == 0
    assert not list((tmp_path / "cache").glob(".partial*"))


def values(embeddings) -> list[list[float]]:
    return [embeddings[position].ravel().tolist() for position in range(len(embeddings))]


@pytest.mark.parametrize("name", KEY)
def test_a_foreign_cache_is_refused_by_what_differs(build, name):
    build()
    other = {"shape": [1, 1, 4], "preprocessing": {"image_size": 1}}.get(name, "other")
    with pytest.raises(UserError, match=f"cache: made with another {name}; name another"):
        build(**{name: other})


def test_a_full_disk_is_one_line(build, monkeypatch):
    class Writer:
        def __init__(self, path, options):
            self._path = path

        def write(self, record):
            raise RuntimeError(f"write() failed: No space left on device; writing {self._path}")

    module = "array_record.python.array_record_module.ArrayRecordWriter"
    with monkeypatch.context() as patched:
        patched.setattr(module, Writer)
        with pytest.raises(UserError, match=r"train-00000-of-.*: the disk is full"):
            build()
    assert build()[1] > 0, "nothing half-written is taken up"


def test_the_key_knows_what_reaches_the_encoder_and_no_more(built):
    """A threshold on the masks changes no embedding, the normalisation of the input does."""
    info, contract = open_dataset(built, "train")[1], PREPROCESSING["lite"]

    def key(**changes):
        changed = dataclasses.replace(contract, **changes)
        return embedding_cache.cache_key({"w": np.zeros(1)}, changed, info, (1, 1, 3), "float32")

    assert key(mask_threshold=-0.5, upsample="probabilities", ct_windows=("lung",)) == key()
    assert key(normalisation="unit") != key()
