"""Cached image embeddings of a run: what they depend on, and their computation on all devices.

Each process encodes a share of the slices on its own devices.
"""

from collections.abc import Mapping

import jax
import ml_collections
import numpy as np

from medsam_jax.data.augment import Variants
from medsam_jax.data.datasets import Chosen, DatasetInfo, open_dataset
from medsam_jax.data.embedding_cache import SLICES_PER_SHARD, Embeddings, cache_key, open_or_build
from medsam_jax.data.preprocess import check_compatible
from medsam_jax.data.splits import ALL, SEEN
from medsam_jax.errors import UserError
from medsam_jax.hub import resolve
from medsam_jax.inference.engine import Engine
from medsam_jax.models.checkpoint import read_config, read_params
from medsam_jax.models.functional import Functional
from medsam_jax.models.sam import SamConfig
from medsam_jax.training import optimizer as opt
from medsam_jax.training.config import augmentation_of, validate
from medsam_jax.training.lora import Adapted
from medsam_jax.training.setup import configured, open_splits, set_up


def fill_cache(config: ml_collections.ConfigDict) -> None:
    """Computes the embeddings that a run of `config` needs and does not find, and stops.

    Raises UserError as `train_and_evaluate`, and without an `embedding_cache`.
    """
    validate(config)
    if not config.embedding_cache:
        raise UserError("config.embedding_cache: empty; name the directory to fill")
    info = open_splits(config)
    origin = resolve(config.checkpoint)
    stored_config = read_config(origin)
    check_compatible(info, configured(stored_config, config).preprocessing)
    run = set_up(config, stored_config, params=read_params(origin))
    cached_embeddings(config, run.functional, run.labels, run.model_config, info)
    if jax.process_index() == 0:
        print(config.embedding_cache)


def cached_embeddings(
    config: ml_collections.ConfigDict,
    functional: Functional | Adapted,
    labels: Mapping[str, str],
    model_config: SamConfig,
    info: DatasetInfo,
) -> dict[str, Embeddings | Chosen | None]:
    """Returns the embeddings of both splits, computing missing ones; None without a cache.

    Raises UserError if the image encoder is trained, or the cache holds other embeddings.
    """
    if not config.embedding_cache:
        return {"train": None, "tune": None}
    encoder = {n: x for n, x in functional.arrays.items() if n.startswith("image_encoder.")}
    trained = [name for name in encoder if labels[name] != opt.FROZEN]
    if trained:
        raise UserError(
            f"config.embedding_cache: {len(trained)} arrays of the image encoder are trained, such "
            f"as {trained[0]}, so embeddings change; freeze them or empty this field"
        )
    dtype, variants = config.embedding_dtype, config.embedding_variants
    size = model_config.embedding_size
    shape = (size, size, model_config.embed_dim)
    # Folds share the embeddings of all slices, each of which is in the training part of some.
    parts = (ALL,) if config.fold else SEEN
    records = {split: open_dataset(config.data_dir, split)[0] for split in parts}
    augmented = None
    if variants > 1:
        augmented = {"count": variants, **config.augmentation.to_dict()}
        records[parts[0]] = Variants(records[parts[0]], augmentation_of(config), variants)
    precision = config.matmul_precision
    key = cache_key(encoder, model_config.preprocessing, info, shape, dtype, augmented, precision)
    engine = Engine(functional.bind(functional.arrays), precision)
    # Slices go one by one on a CPU in any case; no batch is larger than a shard of the cache.
    largest = 1 if engine.form.cpu else min(16, SLICES_PER_SHARD // len(engine.devices))
    batch_size = len(engine.devices) * max(largest, 1)

    def encode(images: np.ndarray, valid_shapes: np.ndarray) -> jax.Array:
        return engine.embed(images, valid_shapes).astype(dtype)

    found = {
        split: open_or_build(config.embedding_cache, key, of_split, split, encode, batch_size)
        for split, of_split in records.items()
    }
    if not config.fold:
        return found
    train, tune = (info.stored_positions(split) * variants for split in SEEN)
    return {
        "train": Chosen(found[ALL], np.add.outer(train, np.arange(variants)).ravel()),
        "tune": Chosen(found[ALL], tune),  # as stored: the first of its versions
    }
