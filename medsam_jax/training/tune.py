"""DSC and NSD of the tune split during training, as numbers and as pictures."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from medsam_jax.data.embedding_cache import Embeddings
from medsam_jax.data.input_pipeline import DatasetInfo, eval_objects
from medsam_jax.errors import UserError
from medsam_jax.progress import progress
from medsam_jax.training.sharding import model_inputs, put_batch


@dataclasses.dataclass
class TuneResult:
    """Scores of one pass: `scalars` by name, `overlays` of the objects with the lowest DSC."""

    scalars: dict[str, float]
    overlays: dict[str, np.ndarray]

    @property
    def dice(self) -> float:
        return self.scalars["tune/dice"]


class TuneEvaluation:
    """Scores every object of the tune split; boxes are jittered as in training, but always alike.

    Each process scores its share; the means are over all objects of all processes. An empty
    prediction counts 0; an object cannot be empty in a data set.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        info: DatasetInfo,
        eval_step: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]],
        sharding: jax.sharding.NamedSharding,
        embeddings: Embeddings | None,
    ):
        self._objects = eval_objects(
            config.data_dir,
            "tune",
            batch_size=config.eval_batch_size // jax.process_count(),
            box_jitter=config.box_jitter,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            embeddings=embeddings,
        )
        if len(self._objects) == 0:
            raise UserError(f"{config.data_dir}: the tune split holds no object to score")
        self._modalities = sorted({case["modality"] for case in info.record["cases"]})
        self._eval_step = eval_step
        self._sharding = sharding
        self._overlay_count = config.eval_overlays

    def __call__(self, arrays: Mapping[str, jax.Array]) -> TuneResult:
        sums = np.zeros((len(self._modalities), 3))  # dice, nsd, count of each modality
        worst = []
        for batch in progress(self._objects, "tune split"):
            inputs = put_batch(model_inputs(batch), self._sharding)
            scores = {name: _local(x) for name, x in self._eval_step(arrays, inputs).items()}
            for item in np.flatnonzero(batch["weight"]):
                dice, nsd = scores["dice"][item], scores["nsd"][item]
                sums[self._modalities.index(batch["modality"][item])] += dice, nsd, 1
                worst.append((dice, _picture(batch, scores["prediction"], item)))
            worst = sorted(worst, key=lambda pair: pair[0])[: self._overlay_count]
        sums = multihost_utils.process_allgather(sums).reshape(-1, *sums.shape).sum(axis=0)
        return TuneResult(
            self._means(sums),
            {f"tune/worst_{rank}": picture() for rank, (_, picture) in enumerate(worst)},
        )

    def _means(self, sums: np.ndarray) -> dict[str, float]:
        dice, nsd, count = sums.sum(axis=0).tolist()
        scalars = {"tune/dice": dice / count, "tune/nsd": nsd / count, "tune/objects": count}
        for name, (dice, nsd, count) in zip(self._modalities, sums.tolist(), strict=True):
            if count:
                scalars |= {f"tune/dice_{name}": dice / count, f"tune/nsd_{name}": nsd / count}
        return scalars


def _local(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split by its leading axis, in order."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _picture(batch: Mapping[str, Any], predictions: np.ndarray, item: int):
    """Draws only when called: most objects are not among the worst."""
    height, width = batch["valid_shape"][item]
    image, truth, prediction = (
        array[item, :height, :width] for array in (batch["image"], batch["mask"], predictions)
    )
    box = batch["box"][item]

    def draw() -> np.ndarray:
        from medsam_jax.evaluation.figures import overlay

        return overlay(image, truth, prediction, box)

    return draw
