"""Label maps of a volume: of prompted objects, or of all that is found on a slice."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from medsam_jax.errors import FatalError, UserError
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator, label_map
from medsam_jax.inference.prompt_file import ObjectPrompts, arguments
from medsam_jax.inference.request import Request
from medsam_jax.inference.volume import VolumePredictor, clean


@dataclasses.dataclass
class Segmentation:
    """Labels of slices along the first axis, and a record of each object."""

    labels: np.ndarray  # int32 [Z, H, W]
    objects: list[dict[str, Any]]  # each with "label", "name", "prompts", ...
    filtered: dict[str, int] | None = None  # of automatic masks: tried, dropped by filter, kept


def segment_objects(
    volume: VolumePredictor, objects: list[ObjectPrompts], request: Request
) -> Segmentation:
    """Segments prompted objects one after another; where they overlap the better score stays.

    Raises UserError for a prompt that the volume or the model cannot take.
    """
    for found in objects:  # all are checked before the first is encoded
        _prompt(volume, found)
    labels = np.zeros(volume.slices.shape[:3], np.int32)
    best = np.full(labels.shape, -np.inf, np.float32)
    records = []
    for found in objects:
        _prompt(volume, found)
        if len(volume.slices) == 1 or request.follow == "off":
            mask, scores = volume.predict_slices()
        else:
            follow = {"interpolate": volume.interpolate, "propagate": volume.propagate}
            mask, scores = follow[request.follow]()
        if request.largest_component or request.fill_holes:
            mask = clean(mask, request.largest_component, request.fill_holes)
        mask &= scores[:, None, None] > best
        labels[mask] = found.label
        best = np.where(mask, scores[:, None, None], best)
        reached = np.flatnonzero(np.isfinite(scores)).tolist()
        record = {
            "label": found.label,
            "name": found.name,
            "prompts": [{"slice": i} | prompt for i, prompt in found.slices.items()],
            "predicted_iou": float(np.nanmean(scores)),
            "slice_scores": {index: float(scores[index]) for index in reached},
        }
        records.append(record)
    return Segmentation(labels, records)


def _prompt(volume: VolumePredictor, found: ObjectPrompts) -> None:
    volume.clear_prompts()
    for index, prompt in found.slices.items():
        try:
            volume.add_prompt(index, **arguments(prompt))
        except UserError as error:
            raise UserError(f"object {found.label}, slice {index}: {error}") from None


def find_all(
    volume: VolumePredictor, start: int, settings: Mapping[str, float] | None = None
) -> Segmentation:
    """Finds everything on one slice of a volume, without prompts.

    Args:
      settings: `AutomaticMaskGenerator`'s parameters that differ from the checkpoint's.

    Raises:
      FatalError: a parameter outside its range, or a grid of points for weights that take boxes.
    """
    settings = settings or {}
    try:
        generator = AutomaticMaskGenerator(
            volume.predictor, output_mode="uncompressed_rle", **settings
        )
    except UserError as error:
        raise FatalError(f"--{error}") from None
    if "points_per_side" in settings and generator.prompts == "boxes":
        raise FatalError(
            f"--points_per_side: {settings['points_per_side']}; this checkpoint is prompted by "
            "boxes for automatic masks; leave it out"
        )
    answers = generator.generate_normalised(volume.slices[start])
    labels = np.zeros(volume.slices.shape[:3], np.int32)
    labels[start] = label_map(answers, labels.shape[1:])
    records = []
    for label, answer in enumerate(sorted(answers, key=lambda a: -a["area"]), start=1):
        prompts: list[dict[str, Any]] = [{"slice": start}]
        scores = {key: answer[key] for key in ("predicted_iou", "stability_score")}
        records.append({"label": label, "name": None, "prompts": prompts} | scores)
    return Segmentation(labels, records, generator.dropped | {"kept": len(answers)})
