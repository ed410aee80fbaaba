"""Masks for everything in an image, with the parameters of segment_anything's generator.

Differences: prompts are a grid of points, or boxes of several sizes for weights trained on boxes
only; filters run on the device in fixed shapes (`mask_filters`), so that memory is that of a batch
of prompts; empty masks are dropped whatever the thresholds; `label_map` is a further output.
"""

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int, UInt8

from medsam_jax.cli import progress
from medsam_jax.data.run_lengths import compress_rle, decode_rle, encode_rle
from medsam_jax.errors import UserError
from medsam_jax.inference import mask_records as records
from medsam_jax.inference.engine import EncodedImage
from medsam_jax.inference.mask_filters import (
    FILTERS,
    Filtered,
    Thresholds,
    enlargement,
    filter_masks,
    low_res_boxes,
    suppress,
)
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.prompts import Prompts, bucket
from medsam_jax.models.sam import Sam
from medsam_jax.models.unet import UNet
from medsam_jax.ops.compile import one_ahead

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle", "label_map"]
_OUTPUTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "binary_mask": decode_rle,
    "label_map": dict,  # decoded one by one
    "uncompressed_rle": dict,
    "coco_rle": compress_rle,
}

# Least predicted IoU and stability. SAM's for points, which leave no mask of LiteMedSAM's boxes;
# docs/automatic_masks.md has the measurements behind the values for boxes.
_THRESHOLDS = {"points": (0.88, 0.95), "boxes": (0.8, 0.8)}

# Parameters with their least and largest values.
_WHOLE_NUMBERS = {"points_per_side": 1, "points_per_batch": 1, "crop_n_layers": 0}
_WHOLE_NUMBERS |= {"crop_n_points_downscale_factor": 1, "min_mask_region_area": 0, "box_rounds": 0}
_NUMBERS = {"pred_iou_thresh": 1, "stability_score_thresh": 1, "stability_score_offset": np.inf}
_NUMBERS |= {"box_nms_thresh": 1, "crop_nms_thresh": 1, "crop_overlap_ratio": 1}
_MAY_BE_NONE = ("points_per_side", "pred_iou_thresh", "stability_score_thresh")

_MEDICAL: dict[str, Any] = {
    "prompts": "boxes",
    "box_sides": (0.05, 0.1, 0.16, 0.25, 0.4),
    "pred_iou_thresh": 0.75,
    "stability_score_thresh": 0.6,
    "box_nms_thresh": 0.3,
}

_OVERLAP = "overlap"  # the last filter, on the host
_COUNTS = ("tried", *FILTERS, _OVERLAP)

# Masks of a grid's boxes whose own boxes become prompts: predicted IoU above this, and none whose
# box overlaps that of a better mask by more than this IoU.
_LEAST_IOU_TO_FOLLOW = 0.4
_SAME_BOX = 0.7


@dataclasses.dataclass
class _Candidate:
    """A mask that passed the filters, in pixels of the whole image."""

    counts: np.ndarray  # run lengths of the image
    box: tuple[int, int, int, int]
    predicted_iou: float
    stability_score: float
    prompt: dict[str, list[list[float]]]  # "point_coords" or "prompt_box"
    crop_box: tuple[int, int, int, int]

    def rle(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {"size": list(shape), "counts": self.counts.tolist()}


@dataclasses.dataclass(eq=False)
class AutomaticMaskGenerator:
    """Finds masks without prompts by asking for one everywhere and keeping the good ones.

    Longer than other classes here: it has `SamAutomaticMaskGenerator`'s many parameters. The
    filters are in `mask_filters`, what needs no device in `mask_records`.

    Args:
      model: a `Sam`, or a `Predictor` whose compiled programs are shared.
      points_per_side: of the grid of points, None with `point_grids`; ignored for boxes.
      points_per_batch: prompts that go through the decoder together; bounds the memory.
      pred_iou_thresh: least predicted IoU, 0 to 1; 0 keeps all, as in SAM. None is 0.88 for
        points, as in SAM, and 0.8 for boxes.
      stability_score_thresh: least IoU between the masks at two cut-offs. None is 0.95 for points,
        as in SAM, and 0.8 for boxes.
      stability_score_offset: distance of the cut-offs from the mask threshold, in logits.
      box_nms_thresh: box IoU above which the mask with the lower predicted IoU is dropped.
      crop_n_layers: layer i adds 4 ** i overlapping crops, each treated as an image.
      crop_nms_thresh: as `box_nms_thresh`, between crops; masks of smaller crops win.
      crop_overlap_ratio: overlap of the crops of layer 1, as a part of the shorter side.
      crop_n_points_downscale_factor: points per side are divided by it from layer to layer.
      point_grids: points [N, 2] in parts of width and height, one array for each crop layer.
      min_mask_region_area: holes and islands below this many pixels are removed.
      output_mode: form of `segmentation`; "label_map" makes `generate` return one array.
      prompts: "points", "boxes", or None for the kind that the weights were trained on: the
        checkpoint's `automatic_prompts`, else points for SAM's (recipe "sam") and boxes for the
        MedSAM family, which returns a nearly empty mask for a point.
      box_sides: sides of the boxes, as parts of the image's shorter side.
      box_rounds: how often each box is replaced by the box of its mask before masks are kept.

    Raises:
      UserError: a parameter outside its range.
    """

    model: dataclasses.InitVar[Sam | Predictor]
    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float | None = None
    stability_score_thresh: float | None = None
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: Sequence[np.ndarray] | None = None
    min_mask_region_area: int = 0
    output_mode: OutputMode = "binary_mask"
    prompts: Literal["points", "boxes"] | None = None
    box_sides: Sequence[float] = (0.1, 0.2, 0.4)
    box_rounds: int = 0

    def __post_init__(self, model: Sam | Predictor):
        self._check()
        self.dropped = dict.fromkeys(_COUNTS, 0)
        self.predictor = Predictor.of(model)
        if isinstance(self.predictor.model, UNet):
            raise UserError("model: a U-Net predicts no IoU to choose masks by; use a SAM")
        self._engine = self.predictor.engine
        config = self._engine.model.config
        by_recipe = "points" if config.preprocessing.recipe == "sam" else "boxes"
        self.prompts = self.prompts or config.automatic_prompts or by_recipe
        if self.point_grids is None:
            factor, layers = self.crop_n_points_downscale_factor, range(self.crop_n_layers + 1)
            per_side = [max(self.points_per_side // factor**layer, 1) for layer in layers]
            self.point_grids = [*map(records.point_grid, per_side)]
        else:
            self.point_grids = [records.unit_grid(*pair) for pair in enumerate(self.point_grids)]
        iou, stability = _THRESHOLDS[self.prompts]
        if self.pred_iou_thresh is None:
            self.pred_iou_thresh = iou
        if self.stability_score_thresh is None:
            self.stability_score_thresh = stability

    def _check(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None or k not in _MAY_BE_NONE}
        for name, least in _WHOLE_NUMBERS.items():
            value = given.get(name, least)
            if not isinstance(value, numbers.Integral) or value < least:
                raise UserError(f"{name}: {value!r}; use a whole number, {least} or more")
        for name, most in _NUMBERS.items():
            value = given.get(name, 0)
            if not isinstance(value, numbers.Real) or not 0 <= value <= most:
                ends = ", 0 or more" if most > 1 else " from 0 to 1"
                raise UserError(f"{name}: {value!r}; use a number{ends}")
        if (self.points_per_side is None) == (self.point_grids is None):
            raise UserError("points_per_side, point_grids: give one of them, the other as None")
        if self.point_grids is not None and len(self.point_grids) <= self.crop_n_layers:
            raise UserError(
                f"point_grids: {len(self.point_grids)} given; give {self.crop_n_layers + 1}, one "
                "for the image and one for each crop layer"
            )
        if self.output_mode not in _OUTPUTS:
            raise UserError(f"output_mode: {self.output_mode!r}; use one of {', '.join(_OUTPUTS)}")
        if self.prompts not in (None, *_THRESHOLDS):
            raise UserError(f"prompts: {self.prompts!r}; use 'points' or 'boxes'")
        sides = tuple(self.box_sides)
        if not sides or not all(0 < side <= 1 for side in sides):
            raise UserError(f"box_sides: {sides}; use parts of the shorter side, 0 to 1")

    @classmethod
    def medical(cls, model: Sam | Predictor, **changes: Any) -> "AutomaticMaskGenerator":
        """Returns a generator with settings for scans and weights trained on boxes.

        docs/automatic_masks.md says how they were chosen; `changes` replace or add to them.
        """
        return cls(model, **(_MEDICAL | changes))

    def generate(
        self, image: np.ndarray, modality: str | None = None, window: str | None = None
    ) -> list[dict[str, Any]] | np.ndarray:
        """Generates all masks of an image.

        Args:
          image, modality, window: as `Predictor.set_image`.

        Returns:
          For each mask, a dict of `segmentation` (by `output_mode`), `area`, `bbox` [x, y, w, h],
          `predicted_iou`, `stability_score`, `crop_box` [x, y, w, h], and `point_coords` [[x, y]]
          or `prompt_box` [[x0, y0, x1, y1]]. For "label_map", int32 [H, W] instead: 0 where there
          is no mask, smaller masks over larger ones. `dropped` then holds how many masks were tried
          and how many each filter has dropped.
        """
        return self.generate_normalised(self.predictor.normalise(image, modality, window))

    def generate_normalised(
        self, image: UInt8[np.ndarray, "h w *c"]
    ) -> list[dict[str, Any]] | Int[np.ndarray, "h w"]:
        """Generates masks of a uint8 image that `Predictor.normalise` returned, or of a part."""
        shape = image.shape[:2]
        self.dropped = dict.fromkeys(_COUNTS, 0)
        crops = records.crop_boxes(shape, self.crop_n_layers, self.crop_overlap_ratio)
        found: list[_Candidate] = []
        for crop_box, layer in crops:
            found += self._of_crop(image, crop_box, layer)
        if len(crops) > 1:
            sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (c.crop_box for c in found)]
            found = self._keep(found, [1 / size for size in sizes], self.crop_nms_thresh)
        if self.min_mask_region_area:
            found = self._without_small_regions(found, shape)
        answers = [self._record(candidate, shape) for candidate in found]
        return label_map(answers, shape) if self.output_mode == "label_map" else answers

    def _of_crop(self, image: np.ndarray, crop_box, layer: int) -> list[_Candidate]:
        x0, y0, x1, y1 = crop_box
        engine, contract = self._engine, self._engine.preprocessing
        [crop] = engine.encode([image[y0:y1, x0:x1]])
        shape = crop.original_shape
        if self.prompts == "points":
            grid = self.point_grids[layer] * shape[::-1]
        else:
            grid = records.box_grid(shape, self.box_sides)
            for _ in range(self.box_rounds):
                grid = self._boxes_of_masks(crop, grid)
        steps = enlargement(engine.mask_side, crop.valid_shape, shape, contract)
        place = jax.device_put((steps, np.array(crop_box), np.array(image.shape[:2])))
        least = self.pred_iou_thresh, self.stability_score_thresh
        thresholds = Thresholds(*least, self.stability_score_offset, contract.mask_threshold)

        def launch(batch: np.ndarray) -> tuple[np.ndarray, Filtered]:
            """Starts decoder and filters; does not wait for them."""
            answers = self._decode(crop, batch)
            valid = np.arange(len(answers[1])) < len(batch)
            return batch, filter_masks(
                *answers, valid, *place, thresholds, upsample=contract.upsample
            )

        found: list[_Candidate] = []
        for batch, filtered in one_ahead(map(launch, self._batches(grid))):
            found += self._collect(batch, filtered, crop_box, image.shape[:2])
        return self._keep(found, [c.predicted_iou for c in found], self.box_nms_thresh)

    def _batches(self, grid: np.ndarray) -> Iterable[np.ndarray]:
        size = self.points_per_batch
        parts = [grid[start : start + size] for start in range(0, len(grid), size)]
        return progress(parts, f"automatic masks, {len(grid)} {self.prompts}")

    def _boxes_of_masks(self, crop: EncodedImage, grid: np.ndarray) -> np.ndarray:
        """Boxes of the masks that boxes [N, 4] give, without those that repeat another.

        A box of a grid seldom fits an object; the box of its mask fits better.
        """
        engine, shape = self._engine, crop.original_shape
        found, scores = [], []
        for batch in self._batches(grid):
            logits, predicted_iou = self._decode(crop, batch)
            boxes = low_res_boxes(logits[:, 0], engine.preprocessing.mask_threshold)
            found.append(np.asarray(boxes)[: len(batch)])
            scores.append(np.asarray(predicted_iou)[: len(batch), 0])
        stored_per_logit = engine.recipe.size / engine.mask_side
        pixels_per_logit = np.divide(shape, crop.valid_shape)[::-1] * stored_per_logit  # x, y
        boxes = np.concatenate(found) * np.tile(pixels_per_logit, 2)
        boxes = np.minimum(boxes, np.tile(shape[::-1], 2)) - (0, 0, 1, 1)
        scores = np.where((boxes[:, 2:] > boxes[:, :2]).all(axis=1), np.concatenate(scores), 0)
        chosen = np.flatnonzero(scores > _LEAST_IOU_TO_FOLLOW)
        return boxes[chosen[suppress(boxes[chosen], scores[chosen], _SAME_BOX)]]

    def _decode(self, crop: EncodedImage, batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Logits [P, C, m, m] and scores [P, C] of a batch padded to one of three sizes.

        A point is ambiguous and gets three masks, a box one.
        """
        by_points = self.prompts == "points"
        batch = batch.astype(np.float32)
        labels = np.ones((len(batch), 1), np.int32)
        prompts = Prompts(batch[:, None], labels) if by_points else Prompts(boxes=batch)
        smallest = -(-self.points_per_batch // 4)
        padded = min(max(bucket(len(batch)), smallest), self.points_per_batch)
        logits, scores = self._engine.decode(
            crop.embedding[None], [crop.original_shape], [prompts], by_points, padded
        )
        return logits[0], scores[0]

    def _collect(
        self, batch: np.ndarray, filtered: Filtered, crop_box, image_shape
    ) -> list[_Candidate]:
        """Reads the masks that passed, as run lengths; the others never leave the device."""
        count = int(filtered.count)
        counts = np.asarray(filtered.dropped).tolist()
        for name, number in zip(FILTERS, counts, strict=True):
            self.dropped[name] += number
        self.dropped["tried"] += count + sum(counts)
        if count == 0:
            return []
        packed = np.asarray(filtered.packed[: min(bucket(count), len(filtered.packed))])
        prompts, scores, stability, boxes = map(np.asarray, filtered[1:5])
        kind = "point_coords" if self.prompts == "points" else "prompt_box"
        corner = np.tile(crop_box[:2], batch.shape[1] // 2)
        return [
            _Candidate(
                counts=records.encode_packed(packed[i], boxes[i], crop_box, image_shape),
                box=tuple(boxes[i].tolist()),
                predicted_iou=float(scores[i]),
                stability_score=float(stability[i]),
                prompt={kind: [(batch[prompt] + corner).tolist()]},
                crop_box=crop_box,
            )
            for i, prompt in enumerate(prompts[:count])
        ]

    def _without_small_regions(self, found: list[_Candidate], shape) -> list[_Candidate]:
        """Cleans masks, then drops duplicates that arose; masks left unchanged are preferred."""
        scores = []
        for candidate in found:
            mask = decode_rle(candidate.rle(shape))
            mask, changed = records.remove_small_regions(mask, self.min_mask_region_area)
            if changed:
                candidate.counts = np.array(encode_rle(mask)["counts"], np.int32)
                candidate.box = records.mask_box(mask)
            scores.append(0.0 if changed else 1.0)
        return self._keep(found, scores, max(self.box_nms_thresh, self.crop_nms_thresh))

    def _keep(
        self, found: list[_Candidate], scores: Sequence[float], threshold: float
    ) -> list[_Candidate]:
        """Suppresses masks whose box overlaps that of a better one, and counts them."""
        boxes = np.array([c.box for c in found], np.float32).reshape(-1, 4)
        kept = [found[index] for index in suppress(boxes, np.array(scores), threshold)]
        self.dropped[_OVERLAP] += len(found) - len(kept)
        return kept

    def _record(self, candidate: _Candidate, shape) -> dict[str, Any]:
        x0, y0, x1, y1 = candidate.crop_box
        return {
            "segmentation": _OUTPUTS[self.output_mode](candidate.rle(shape)),
            "area": int(candidate.counts[1::2].sum()),
            "bbox": records.coco_box(candidate.box),
            "predicted_iou": candidate.predicted_iou,
            "stability_score": candidate.stability_score,
            "crop_box": [x0, y0, x1 - x0, y1 - y0],
            **candidate.prompt,
        }


def label_map(answers: Sequence[dict[str, Any]], shape: tuple[int, int]) -> np.ndarray:
    """Paints masks of `generate` into one int32 [H, W], numbered by size, smaller over larger.

    Args:
      answers: with `segmentation` as a mask or as uncompressed run lengths.
      shape: (H, W).
    """
    labels = np.zeros(shape, np.int32)
    for label, answer in enumerate(sorted(answers, key=lambda a: -a["area"]), start=1):
        mask = answer["segmentation"]
        labels[decode_rle(mask) if isinstance(mask, dict) else mask] = label
    return labels
