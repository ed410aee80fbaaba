"""Batches for training and evaluation from a built data set, by grain: ordered, sharded, resumable.

Every random choice (order, label, box, points, augmentation) is a function of the seed and the
position in the run. The order is therefore the same for any number of workers and after a resume,
and the processes of a multi-host run share one global order.
"""

import atexit
import dataclasses
import math
import pathlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from medsam_jax.data import prompts
from medsam_jax.data.augment import Augmentation, Variants, augment
from medsam_jax.data.datasets import open_dataset
from medsam_jax.data.embedding_cache import WithEmbeddings
from medsam_jax.data.objects import present_labels
from medsam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DrawPrompts:
    """Turns a record into a training example: picks objects and draws their prompts.

    Where a slice has fewer objects than prompts, objects repeat with new prompts.

    box_jitter: each box side moves outwards by 0 to this many stored pixels.
    positive_points, negative_points: points on and beside each object.
    point_share: probability that a prompt is points, uniformly 1 to `positive_points` and 0 to
      `negative_points` of them, and not a box. None gives every prompt its box and all points.
    """

    box_jitter: int
    prompts_per_image: int = 1
    positive_points: int = 0
    negative_points: int = 0
    point_share: float | None = None
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if self.prompts_per_image < 1:
            raise UserError(f"prompts_per_image: {self.prompts_per_image}; use 1 or more")
        share, points = self.point_share, self.positive_points
        if share is not None and not (0 <= share <= 1 and points >= 1):
            raise UserError(
                f"point_share: {share} with positive_points {points}; the share is in [0, 1], the "
                "points 1 or more"
            )

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `train_loader` for the fields."""
        image, labels = record["image"], record["mask"][:, :, 0]
        valid_shape = np.asarray(record["valid_shape"], np.int32)
        if self.augmentation is not None:
            image, labels = augment(image, labels, valid_shape, self.augmentation, rng)
        present = present_labels(labels)
        rounds = math.ceil(self.prompts_per_image / len(present))
        order = np.concatenate([rng.permutation(present) for _ in range(rounds)])
        chosen = order[: self.prompts_per_image]
        drawn = [self._draw(labels == label, valid_shape, rng) for label in chosen]
        example = {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}
        if self.prompts_per_image == 1:
            example = {name: array[0] for name, array in example.items()}
        if "embedding" in record:
            example["embedding"] = record["embedding"]
        return {"image": image, "valid_shape": valid_shape} | example

    def _draw(
        self, mask: np.ndarray, valid_shape: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        box = prompts.jitter_box(prompts.box_from_mask(mask), self.box_jitter, valid_shape, rng)
        drawn = {"mask": mask.astype(np.uint8), "box": box}
        if self.positive_points or self.negative_points:
            valid = mask[: valid_shape[0], : valid_shape[1]]
            drawn["points"], drawn["point_labels"] = prompts.draw_points(
                valid, self.positive_points, self.negative_points, rng
            )
        if self.point_share is not None:
            by_points = rng.random() < self.point_share
            drawn["boxes_valid"] = np.bool_(not by_points)
            on = int(rng.integers(1, self.positive_points, endpoint=True)) if by_points else 0
            beside = int(rng.integers(0, self.negative_points, endpoint=True)) if by_points else 0
            prompts.keep_points(drawn["point_labels"], on, beside)
        return drawn


def train_loader(
    data_dir: str | pathlib.Path,
    split: str,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    task: str = "",
    temperature: float = 1.0,
    augmentation: Augmentation | None = None,
    embeddings: Sequence[np.ndarray] | None = None,
    variants: int = 1,
    fold: str = "",
    **drawing: Any,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns an endless grain iterator over shuffled batches, with `get_state` and `set_state`.

    Args:
      data_dir, split, fold: see `open_dataset`.
      batch_size: examples of this process in a batch; the global batch is that times
        `process_count`, and consists of the same examples however many processes share it.
      seed: of order, labels, boxes, points and augmentation.
      num_workers: processes that read and decode; 0 uses threads of this one. Any number gives
        the same batches. A script needs `if __name__ == "__main__":`, as workers import it.
      task: slices of this task only; "" takes all.
      temperature: a (task, modality) with n slices is drawn with probability proportional to
        n ** (1 / temperature): 1 draws all slices alike, large values all groups alike.
      augmentation: None for none.
      embeddings: of the split's slices (`embedding_cache`); adds `embedding` [B, h, w, C].
      variants: number of embeddings of each slice, as stored and augmented; examples come from all
        of them. With one, augmentation beside embeddings is refused.
      drawing: the other fields of `DrawPrompts`; `box_jitter` has no default.

    Returns:
      Iterator of dicts: image uint8 [B, S, S, 3], mask uint8 [B, (P,) S, S] of the chosen objects,
      box float32 [B, (P,) 4] (x_min, y_min, x_max, y_max) in stored pixels, valid_shape int32
      [B, 2]; where points are asked for, points float32 [B, (P,) N, 2] (x, y) and point_labels
      int32 [B, (P,) N], -2 for padding. With `point_share`, boxes_valid bool [B, (P)] tells which
      prompts are boxes; the points of those are padding. The axis P is there with several
      `prompts_per_image`.

    Raises:
      UserError: no such data set, split or task, or a setting out of range.
    """
    import grain.python as grain

    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size}; use 1 or more")
    if not temperature >= 1:
        raise UserError(f"temperature: {temperature}; use 1 (as the data are) or more (more even)")
    if embeddings is not None and augmentation is not None and variants == 1:
        raise UserError("augmentation: embeddings are of unchanged slices; use one of the two")
    if variants > 1 and (embeddings is None or augmentation is None):
        raise UserError(f"variants: {variants}; several need embeddings and augmentation")
    on_the_fly = augmentation if variants == 1 else None
    draw = DrawPrompts(augmentation=on_the_fly, **drawing)
    source, info = open_dataset(data_dir, split, fold)
    if variants > 1:
        # Folds share the versions of a slice: they are drawn by its place in the whole data set.
        places = info.stored_positions(split) if fold else None
        source = Variants(source, augmentation, variants, places)
    if embeddings is not None:
        source = WithEmbeddings(source, embeddings)
    seed = seed % 2**32
    groups = [
        np.add.outer(positions * variants, np.arange(variants)).ravel()
        for positions in info.groups(split, task).values()
    ]
    slices = _shuffled(groups, seed, temperature).map(source.__getitem__)
    drawn = slices.random_map(draw, seed=seed)[process_index::process_count]
    # There is no remainder, but grain rounds the endless length up and overflows for batches of 1.
    batches = drawn.batch(batch_size, drop_remainder=True)
    loader = batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))
    if num_workers > 0:
        _require_main_guard(num_workers)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which a notebook never parses
        loader = loader.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(loader) if num_workers == 0 else _WorkerBatches(iter(loader))


def _require_main_guard(num_workers: int) -> None:
    """Raises UserError in a script that workers, which import it, would run again."""
    main, frame = sys.modules["__main__"], sys._getframe()
    while frame is not None and not (
        frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"
    ):
        frame = frame.f_back
    if frame and hasattr(main, "__file__") and "__name__" not in frame.f_code.co_names:
        raise UserError(
            f"num_workers: {num_workers} in a script that its workers would run again; put its "
            'commands under `if __name__ == "__main__":`, or use num_workers=0'
        )


class _WorkerBatches(Iterator[dict[str, np.ndarray]]):
    """A grain iterator over worker processes, which ends with the program at the latest.

    Batches are copied out of the shared memory. When the interpreter takes modules apart, grain can
    free neither that memory nor its queues.
    """

    def __init__(self, batches: Any):
        self._batches = batches
        self.get_state, self.set_state = batches.get_state, batches.set_state
        atexit.register(_WorkerBatches._close, weakref.ref(self))

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: np.array(array) for name, array in next(self._batches).items()}

    @staticmethod
    def _close(reference: weakref.ref) -> None:
        if (self := reference()) is not None:
            self._batches.close()
            self.__dict__.clear()  # the interpreter's end frees what is left in no useful order


def _shuffled(groups: list[np.ndarray], seed: int, temperature: float) -> Any:
    """An endless grain MapDataset of the groups' positions, reshuffled at each pass."""
    import grain.python as grain

    if temperature == 1.0:
        groups = [np.sort(np.concatenate(groups))]
    shuffled = [grain.MapDataset.source(part).shuffle(seed).repeat() for part in groups]
    if temperature == 1.0:
        return shuffled[0]
    weights = [len(part) ** (1 / temperature) for part in groups]
    return grain.MapDataset.mix(shuffled, weights=weights)


@dataclasses.dataclass(frozen=True)
class EvalObjects:
    """Every (slice, label) object of a split once, in order, in batches; see `eval_objects`."""

    source: Sequence[dict[str, Any]]
    positions: np.ndarray  # of each object of this process
    labels: np.ndarray
    indices: np.ndarray  # of the object in the whole split
    weights: np.ndarray
    batch_size: int
    box_jitter: int
    one_point: bool
    seed: int

    def __len__(self) -> int:
        return len(self.positions) // self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position, record = -1, {}
        for start in range(0, len(self.positions), self.batch_size):
            examples = []
            for at in range(start, start + self.batch_size):
                if self.positions[at] != position:
                    position = int(self.positions[at])
                    record = self.source[position]
                examples.append(self._example(record, at))
            yield _collate(examples)

    def _example(self, record: dict[str, Any], at: int) -> dict[str, Any]:
        mask = record["mask"][:, :, 0] == self.labels[at]
        box = prompts.box_from_mask(mask)
        if self.box_jitter:
            rng = np.random.default_rng([self.seed, int(self.indices[at])])
            box = prompts.jitter_box(box, self.box_jitter, record["valid_shape"], rng)
        example = {name: record[name] for name in ("image", "embedding") if name in record}
        if self.one_point:
            rng = np.random.default_rng([self.seed, int(self.indices[at]), 1])
            example["points"], example["point_labels"] = prompts.draw_points(mask, 1, 0, rng)
        return example | {
            "mask": mask.astype(np.uint8),
            "box": box,
            "valid_shape": np.asarray(record["valid_shape"], np.int32),
            "original_shape": np.asarray(record["original_shape"], np.int32),
            "spacing": np.asarray(record["spacing"], np.float32),
            "weight": self.weights[at],
            "index": self.indices[at],
            "label": int(self.labels[at]),
            "slice_index": int(record["slice_index"]),
            **{name: record[name].decode() for name in ("case_id", "task", "modality")},
        }


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks arrays; Python values become lists."""
    batch = {name: [example[name] for example in examples] for name in examples[0]}
    is_array = {name: isinstance(x, np.ndarray | np.generic) for name, (x, *_) in batch.items()}
    return {name: np.stack(x) if is_array[name] else x for name, x in batch.items()}


def eval_objects(
    data_dir: str | pathlib.Path,
    split: str,
    *,
    batch_size: int,
    box_jitter: int = 0,
    one_point: bool = False,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    task: str = "",
    embeddings: Sequence[np.ndarray] | None = None,
    fold: str = "",
) -> EvalObjects:
    """Returns all objects of a split once, in a fixed order, in batches of one size.

    Every process gets the same number of batches, which collectives need; the last batches are
    filled with repeated objects of weight 0.

    Args:
      data_dir, split, fold: see `open_dataset`.
      batch_size: objects of this process in a batch.
      box_jitter: see `DrawPrompts`; 0 gives exact boxes.
      one_point: adds a point of the object, drawn uniformly, as `points` [B, 1, 2] and
        `point_labels` [B, 1].
      seed: of jitter and point; an object's prompts do not depend on batches or processes.
      task: objects of this task only; "" takes all.
      embeddings: of the split's slices; adds `embedding` [B, h, w, C].

    Returns:
      Sized iterable of dicts with the arrays of `train_loader` for one prompt an image, and
      spacing float32 [B, 2], original_shape int32 [B, 2], weight float32 [B], index int64 [B], and
      the lists label, case_id, task, modality, slice_index.
    """
    source, info = open_dataset(data_dir, split, fold)
    if embeddings is not None:
        source = WithEmbeddings(source, embeddings)
    positions, labels = info.objects(split, task)
    count = len(positions)
    share = math.ceil(math.ceil(count / process_count) / batch_size) * batch_size
    indices = np.arange(share) * process_count + process_index
    weights = (indices < count).astype(np.float32)
    indices = np.minimum(indices, count - 1)
    objects = positions[indices], labels[indices], indices, weights
    return EvalObjects(source, *objects, batch_size, box_jitter, one_point, seed)
