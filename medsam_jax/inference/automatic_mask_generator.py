"""Masks for everything in an image, with the parameters of segment_anything's generator.

Differences: prompts are a grid of points, or boxes of several sizes for weights trained on boxes
only; what fails the predicted IoU is dropped before it is enlarged, and the rest is enlarged one
mask at a time, so that memory is that of a batch of prompts; `label_map` is a further output.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.inference import mask_records as records
from medsam_jax.inference.predictor import Predictor
from medsam_jax.models.sam import Sam
from medsam_jax.progress import progress

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle", "label_map"]
_OUTPUTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "binary_mask": records.decode_rle,
    "label_map": records.decode_rle,
    "uncompressed_rle": lambda rle: rle,
    "coco_rle": records.compress_rle,
}


# Least predicted IoU and stability. SAM's for points. For boxes, on a labelled abdominal CT slice
# with LiteMedSAM: 458 boxes leave 27 masks, 7 of the 9 objects that any of the boxes finds; SAM's
# values leave none.
_THRESHOLDS = {"points": (0.88, 0.95), "boxes": (0.8, 0.8)}


@dataclasses.dataclass
class _Candidate:
    """A mask that passed the filters, in pixels of the whole image."""

    rle: dict[str, Any]
    box: tuple[int, int, int, int]
    predicted_iou: float
    stability_score: float
    prompt: dict[str, list[list[float]]]  # "point_coords" or "prompt_box"
    crop_box: tuple[int, int, int, int]


class AutomaticMaskGenerator:
    """Finds masks without prompts by asking for one everywhere and keeping the good ones.

    Args:
      model: a `Sam`, or a `Predictor` whose compiled programs are shared.
      points_per_side: of the grid of points; ignored for boxes.
      points_per_batch: prompts that go through the decoder together; bounds the memory.
      pred_iou_thresh: least predicted IoU, 0 to 1; 0 keeps all, as SAM's does. None is 0.88 for
        points, as in SAM, and 0.8 for boxes.
      stability_score_thresh: least IoU between the masks at two cut-offs. None is 0.95 for points,
        as in SAM, and 0.8 for boxes.
      stability_score_offset: of the cut-offs from the mask threshold, in logits.
      box_nms_thresh: box IoU above which the mask with the lower predicted IoU is dropped.
      crop_n_layers: layer i adds 4 ** i overlapping crops, each treated as an image.
      crop_nms_thresh: as `box_nms_thresh`, between crops; masks of smaller crops win.
      crop_overlap_ratio: overlap of the crops of layer 1, as a part of the shorter side.
      crop_n_points_downscale_factor: points per side are divided by it from layer to layer.
      min_mask_region_area: holes and islands below this many pixels are removed.
      output_mode: form of `segmentation`; "label_map" makes `generate` return one array.
      prompts: "points", "boxes", or None for what the weights were trained on: points for SAM's
        (recipe "sam"), boxes for the MedSAM family, which answers a point with nothing.
      box_sides: of the boxes, as parts of the image's shorter side.

    Raises:
      UserError: a parameter outside its range.
    """

    def __init__(
        self,
        model: Sam | Predictor,
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float | None = None,
        stability_score_thresh: float | None = None,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        prompts: Literal["points", "boxes"] | None = None,
        box_sides: Sequence[float] = (0.1, 0.2, 0.4),
    ):
        for name, value, least in (
            ("points_per_side", points_per_side, 1),
            ("points_per_batch", points_per_batch, 1),
            ("crop_n_layers", crop_n_layers, 0),
            ("crop_n_points_downscale_factor", crop_n_points_downscale_factor, 1),
        ):
            if value < least:
                raise UserError(f"{name}: {value}; use {least} or more")
        if output_mode not in _OUTPUTS:
            raise UserError(f"output_mode: {output_mode!r}; use one of {', '.join(_OUTPUTS)}")
        if prompts not in (None, "points", "boxes"):
            raise UserError(f"prompts: {prompts!r}; use 'points' or 'boxes'")
        if not box_sides or not all(0 < side <= 1 for side in box_sides):
            raise UserError(f"box_sides: {tuple(box_sides)}; use parts of the shorter side, 0 to 1")
        self.predictor = Predictor.of(model)
        preprocessing = self.predictor.model.config.preprocessing
        trained_on = "points" if preprocessing.recipe == "sam" else "boxes"
        self.prompts = prompts or trained_on
        self.points_per_side = points_per_side
        self.points_per_batch = points_per_batch
        iou, stability = _THRESHOLDS[self.prompts]
        self.pred_iou_thresh = iou if pred_iou_thresh is None else pred_iou_thresh
        self.stability_score_thresh = (
            stability if stability_score_thresh is None else stability_score_thresh
        )
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.box_sides = tuple(box_sides)
        self._threshold = preprocessing.mask_threshold

    def generate(
        self, image: np.ndarray, modality: str | None = None, window: str | None = None
    ) -> list[dict[str, Any]] | np.ndarray:
        """All masks of an image.

        Args:
          image, modality, window: as `Predictor.set_image`.

        Returns:
          For each mask, a dict of `segmentation` (by `output_mode`), `area`, `bbox` [x, y, w, h],
          `predicted_iou`, `stability_score`, `crop_box` [x, y, w, h], and `point_coords` [[x, y]]
          or `prompt_box` [[x0, y0, x1, y1]]. For "label_map", int32 [H, W] instead: 0 where there
          is no mask, smaller masks over larger ones.
        """
        image = self.predictor.normalise(image, modality, window)
        shape = image.shape[:2]
        crops = records.crop_boxes(shape, self.crop_n_layers, self.crop_overlap_ratio)
        found: list[_Candidate] = []
        for crop_box, layer in crops:
            found += self._of_crop(image, crop_box, layer)
        if len(crops) > 1:
            sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (c.crop_box for c in found)]
            found = _keep(found, [1 / size for size in sizes], self.crop_nms_thresh)
        if self.min_mask_region_area:
            found = self._without_small_regions(found)
        answers = [self._record(candidate) for candidate in found]
        return label_map(answers, shape) if self.output_mode == "label_map" else answers

    def _of_crop(self, image: np.ndarray, crop_box, layer: int) -> list[_Candidate]:
        x0, y0, x1, y1 = crop_box
        self.predictor.set_normalised([image[y0:y1, x0:x1]])
        found = []
        for batch in self._batches((y1 - y0, x1 - x0), layer):
            found += self._of_batch(batch, crop_box, image.shape[:2])
        self.predictor.reset_image()
        return _keep(found, [c.predicted_iou for c in found], self.box_nms_thresh)

    def _batches(self, shape: tuple[int, int], layer: int) -> Iterator[np.ndarray]:
        """Points [N, 2] or boxes [N, 4] in pixels of a crop of `shape`."""
        if self.prompts == "points":
            factor = self.crop_n_points_downscale_factor**layer
            grid = records.point_grid(max(self.points_per_side // factor, 1)) * shape[::-1]
        else:
            grid = records.box_grid(shape, self.box_sides)
        size = self.points_per_batch
        parts = [grid[start : start + size] for start in range(0, len(grid), size)]
        return progress(parts, f"automatic masks, {len(grid)} {self.prompts}")

    def _of_batch(self, batch: np.ndarray, crop_box, image_shape) -> list[_Candidate]:
        if self.prompts == "points":
            prompts = {
                "point_coords": batch[:, None],
                "point_labels": np.ones((len(batch), 1), int),
            }
        else:
            prompts = {"box": batch}
        multimask = self.prompts == "points"  # a box is not ambiguous
        [(scores, logits)] = self.predictor.predict_low_res([prompts], multimask)
        found = []
        wanted = scores > (self.pred_iou_thresh if self.pred_iou_thresh > 0 else -np.inf)
        for prompt, channel in np.argwhere(wanted):
            candidate = self._candidate(logits[prompt, channel], crop_box, image_shape)
            if candidate is not None:
                candidate.predicted_iou = float(scores[prompt, channel])
                candidate.prompt = self._prompt_record(batch[prompt], crop_box)
                found.append(candidate)
        return found

    def _candidate(self, logits: np.ndarray, crop_box, image_shape) -> _Candidate | None:
        """The mask of low-resolution logits, or None where it is unstable or cut by its crop."""
        x0, y0, x1, y1 = crop_box
        restored = self.predictor.restore(logits, return_logits=True)
        stability = records.stability_score(restored, self._threshold, self.stability_score_offset)
        if stability < self.stability_score_thresh:
            return None
        mask = np.zeros(image_shape, bool)
        mask[y0:y1, x0:x1] = restored > self._threshold
        box = records.mask_box(mask)
        if not mask.any() or records.touches_crop_edge(box, crop_box, image_shape):
            return None
        return _Candidate(records.encode_rle(mask), box, 0.0, stability, {}, crop_box)

    def _prompt_record(self, prompt: np.ndarray, crop_box) -> dict[str, list[list[float]]]:
        name = "point_coords" if self.prompts == "points" else "prompt_box"
        corner = np.tile(crop_box[:2], len(prompt) // 2)
        return {name: [(prompt + corner).tolist()]}

    def _without_small_regions(self, found: list[_Candidate]) -> list[_Candidate]:
        """Cleans masks, then drops duplicates this made; masks that needed none are preferred."""
        scores = []
        for candidate in found:
            mask = records.decode_rle(candidate.rle)
            mask, changed = records.remove_small_regions(mask, self.min_mask_region_area)
            if changed:
                candidate.rle, candidate.box = records.encode_rle(mask), records.mask_box(mask)
            scores.append(0.0 if changed else 1.0)
        return _keep(found, scores, max(self.box_nms_thresh, self.crop_nms_thresh))

    def _record(self, candidate: _Candidate) -> dict[str, Any]:
        return {
            "segmentation": _OUTPUTS[self.output_mode](candidate.rle),
            "area": sum(candidate.rle["counts"][1::2]),
            "bbox": _xywh(candidate.box),
            "predicted_iou": candidate.predicted_iou,
            "stability_score": candidate.stability_score,
            "crop_box": _xywh(candidate.crop_box),
            **candidate.prompt,
        }


def label_map(answers: Sequence[dict[str, Any]], shape: tuple[int, int]) -> np.ndarray:
    """Masks of `generate` as one int32 [H, W], numbered by size; smaller ones lie over larger."""
    labels = np.zeros(shape, np.int32)
    for label, answer in enumerate(sorted(answers, key=lambda a: -a["area"]), start=1):
        labels[answer["segmentation"]] = label
    return labels


def _keep(found: list[_Candidate], scores: Sequence[float], threshold: float) -> list[_Candidate]:
    boxes = np.array([c.box for c in found], np.float64).reshape(-1, 4)
    return [found[index] for index in records.suppress(boxes, np.array(scores), threshold)]


def _xywh(box: tuple[int, int, int, int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
