"""Scores of the tune split during training, as numbers and as pictures."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from medsam_jax.cli import progress
from medsam_jax.data.datasets import DatasetInfo
from medsam_jax.data.input_pipeline import eval_objects
from medsam_jax.ops.compile import one_ahead
from medsam_jax.training.sharding import model_inputs, put_batch
from medsam_jax.training.step import batch_metrics

SELECTED_BY = ("tune/dice", "tune/point_dice")


@dataclasses.dataclass
class TuneResult:
    """Scores of the tune split: `scalars` by name, `overlays` of the objects with lowest DSC."""

    scalars: dict[str, float]
    overlays: dict[str, np.ndarray]

    @property
    def score(self) -> float:
        """Model-selection score: mean DSC of boxes, or of boxes and points if these are trained."""
        return sum(self.parts.values()) / len(self.parts)

    @property
    def parts(self) -> dict[str, float]:
        """The scalars whose mean is `score`, by name."""
        return {name: self.scalars[name] for name in SELECTED_BY if name in self.scalars}


class TuneEvaluation:
    """Scores every object of the tune split by its box.

    Boxes are jittered as in training, and the same in every evaluation. If points are trained, each
    object is scored by one point too: the single mask, and the mask of three with the highest
    predicted IoU. Each process scores its share; means are over the objects of all processes.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        info: DatasetInfo,
        eval_step: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]],
        sharding: jax.sharding.NamedSharding,
        embeddings: Sequence[np.ndarray] | None,
    ):
        self._objects = eval_objects(
            config.data_dir,
            "tune",
            batch_size=config.eval_batch_size // jax.process_count(),
            box_jitter=config.box_jitter,
            one_point=config.point_share > 0,
            seed=config.seed,
            task=config.task,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            embeddings=embeddings,
            fold=config.fold,
        )
        self._names = list(batch_metrics())
        if config.point_share > 0:
            self._names += [*(f"point_{name}" for name in batch_metrics()), "point_best_dice"]
        if config.losses.iou:
            errors = ("iou_error", "point_iou_error", "point_best_iou_error")
            self._names += errors if config.point_share > 0 else errors[:1]
        self._modalities = sorted({case["modality"] for case in info.record["cases"]})
        self._eval_step = eval_step
        self._sharding = sharding
        self._overlay_count = config.eval_overlays

    def __call__(self, arrays: Mapping[str, jax.Array]) -> TuneResult:
        sums = np.zeros((len(self._modalities), len(self._names) + 1))  # the last is the count
        worst = {kind: [] for kind in ("", "point_") if f"{kind}dice" in self._names}
        for batch, launched in one_ahead(self._launch(arrays)):
            scores = {name: _local(x) for name, x in launched.items()}
            for item in np.flatnonzero(batch["weight"]).tolist():
                row = [scores[name][item] for name in self._names]
                sums[self._modalities.index(batch["modality"][item])] += *row, 1
                for kind, found in worst.items():
                    picture = _picture(batch, scores, item, kind)
                    found.append((scores[f"{kind}dice"][item], picture))
            for kind, found in worst.items():
                worst[kind] = sorted(found, key=lambda pair: pair[0])[: self._overlay_count]
        sums = multihost_utils.process_allgather(sums).reshape(-1, *sums.shape).sum(axis=0)
        overlays = {
            f"tune/worst_{kind}{rank}": picture()
            for kind, found in worst.items()
            for rank, (_, picture) in enumerate(found)
        }
        return TuneResult(self._means(sums), overlays)

    def _launch(self, arrays: Mapping[str, jax.Array]) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yields each batch with its scores, which the devices may not have finished."""
        for batch in progress(self._objects, "tune split"):
            yield batch, self._eval_step(arrays, put_batch(model_inputs(batch), self._sharding))

    def _means(self, sums: np.ndarray) -> dict[str, float]:
        """Divides the sums [modalities, names and count], of all objects and of each modality."""
        rows = {"": sums.sum(axis=0)}
        rows |= {f"_{name}": row for name, row in zip(self._modalities, sums, strict=True)}
        scalars = {"tune/objects": float(rows[""][-1])}
        for suffix, (*totals, count) in rows.items():
            if count:
                means = np.divide(totals, count).tolist()
                names = [f"tune/{name}{suffix}" for name in self._names]
                scalars |= zip(names, means, strict=True)
        return scalars


def _local(array: jax.Array) -> np.ndarray:
    """Returns this process's rows of an array that is split by its leading axis, in order."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _picture(batch: Mapping[str, Any], scores: Mapping[str, np.ndarray], item: int, kind: str):
    """Returns a function that draws the object, since few objects are drawn."""
    height, width = batch["valid_shape"][item]
    image, truth, prediction = (
        array[item, :height, :width]
        for array in (batch["image"], batch["mask"], scores[f"{kind}prediction"])
    )
    prompt = {"points": batch["points"][item]} if kind else {"box": batch["box"][item]}

    def draw() -> np.ndarray:
        from medsam_jax.drawing import overlay

        return overlay(image, truth > 0, prediction, **prompt)

    return draw
