"""Scores checkpoints on whole scans of a manifest: per object in 3D (mm), per slice in 2D (px).

Each slice that holds an object gets one prompt, drawn from the first annotator's mask. Predictions
are put back into the scan's own grid and scored there, in the scan's spacing, against every
annotator. Pictures (one slice) are scored natively in 2D, in pixels.
"""

import dataclasses
import functools
import itertools
import logging
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.cli import progress
from medsam_jax.data.datasets import mask_label_names
from medsam_jax.data.manifest import (
    DATA_SET,
    FIRST,
    Case,
    case_hash,
    count_splits,
    image_hash,
    read_cases,
    short_hash,
)
from medsam_jax.data.modality import doubts
from medsam_jax.data.preprocess import intensity_limits, normalise_intensity, resize_image
from medsam_jax.data.prompts import Prompt
from medsam_jax.data.recipes import get_recipe
from medsam_jax.data.run_lengths import encode_runs
from medsam_jax.errors import UserError
from medsam_jax.evaluation.base import PIXELS, Entry, Evaluation, ObjectScore, prompt_fields
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.inference.slice_predictor import SlicePredictor, SliceTask
from medsam_jax.io.files import sha256_of_json, split_series
from medsam_jax.io.geometry import slice_axis, slice_spacing
from medsam_jax.io.notes import log_notes
from medsam_jax.io.scans import read_mask_scan, read_scan
from medsam_jax.metrics import lesion_size

log = logging.getLogger(__name__)

_Key = tuple[int, int, Protocol]  # slice, label, how it was prompted


@dataclasses.dataclass(frozen=True)
class _Volume:
    """A case with its slices along the first axis."""

    case: Case
    image: np.ndarray  # [Z, Y, X] or [Z, Y, X, 3], as read
    labels: dict[str, np.ndarray]  # annotator -> label map [Z, Y, X]
    spacing: tuple[float, ...]  # mm
    present: tuple[int, ...]  # labels that are scored


class VolumeEvaluation(Evaluation):
    """Scores checkpoints on the scans of a manifest; its items are the cases.

    Longer than other classes here: a case is read, predicted, scored and shown in its own grid.

    Args:
      manifest, split, data_set: see `read_cases`, also for the errors raised.
      settings: see `Evaluation`; shifts are in pixels of the scan's own slices, the tolerance in mm
        for volumes, in pixels for slices and pictures.
      labels: labels that every case must have and that are scored; empty scores all there are.
      label_names: names of labels, instead of those of the data set beside the manifest.
      with_burden: whether rows hold volumes and diameters.
    """

    unit, scoring = "mm (px for pictures)", "volumes in 3D, in mm; pictures and slices in 2D, in px"
    columns = ("checkpoint", "case_id", "task", "modality", "reference", "label", "label_name")
    columns += (
        "prompt",
        "box_shift",
        "unit",
        "slice_index",
        "trained_on",
        "truth_size",
        "predicted_size",
    )

    def __init__(
        self,
        manifest: str | Path,
        split: str | None,
        *settings: Any,
        labels: Collection[int] = (),
        label_names: Mapping[int, str] | None = None,
        with_burden: bool = False,
        data_set: str = DATA_SET,
    ):
        super().__init__(*settings)
        self.cases = read_cases(manifest, split, data_set)
        self._labels, self._burden, self._data_set = tuple(labels), with_burden, data_set
        self._label_names, self._built_names = label_names or {}, mask_label_names(manifest)
        self.title = f"{len(self.cases)} scans of `{manifest}` ({count_splits(self.cases)})"
        print(f"{manifest}: scoring scans: {count_splits(self.cases)}", file=sys.stderr, flush=True)

    def items(self) -> dict[int | str, int]:
        """Returns the places of the cases in the manifest, by the state of their files."""
        return {_state(case): index for index, case in enumerate(self.cases)}

    def patients(self) -> dict[str, str]:
        return {case.case_id: case_hash(self._data_set, case.case_id) for case in self.cases}

    def patients_of_split(self, split: str) -> set[str]:
        return {case.case_id for case in self.cases if case.split == split}

    def patient_of(self, item: int) -> str:
        return self.cases[item].case_id

    def label_name(self, task: str, label: int) -> str:
        return self._label_names.get(label) or self._built_names.get((task, label), str(label))

    def image_hashes(self, patient: str) -> set[str]:
        return {self._hashes[case.image] for case in self.cases if case.case_id == patient}

    @functools.cached_property
    def _hashes(self) -> dict[str, str]:
        """Hash of each scan by its path; read once, before the work."""
        images = dict.fromkeys(case.image for case in self.cases)
        scans = progress(list(images), "comparing scans with those of the training")
        return {image: short_hash(image_hash(read_scan(image).array)) for image in scans}

    def identity(self) -> dict[str, Any]:
        return {"settings": [self._labels, self._burden]}

    def score(self, predictor: SlicePredictor, items: Sequence[int]) -> Iterator[list[Entry]]:
        for index in progress(items, "scans"):
            yield [self._score_case(predictor, index)]

    def evaluate_annotators(self) -> list[ObjectScore]:
        def score(items: list[int]) -> Iterator[list[Entry]]:
            for index in progress(items, "annotators"):
                yield [self._score_annotators(index)]

        several = any(len(case.masks) > 1 for case in self.cases)
        return self._rows(None, ["annotators"], score) if several else []

    def show(self, row: ObjectScore) -> tuple[np.ndarray, np.ndarray]:
        volume = _read(self.cases[row.item], self._labels)
        recipe, modality = get_recipe(row.recipe), volume.case.modality
        limits = intensity_limits(volume.image, modality, recipe, row.window)
        plane = volume.image[row.slice_index]
        image = normalise_intensity(plane, modality, recipe, row.window, limits)
        return image, volume.labels[row.reference][row.slice_index] == row.label

    def _score_case(self, predictor: SlicePredictor, index: int) -> Entry:
        volume = _read(self.cases[index], self._labels)
        contract = predictor.preprocessing
        shown = {"recipe": contract.recipe, "window": contract.ct_window(volume.case.window)}
        entry = Entry(_state(volume.case), [])
        prompts = _draw_prompts(volume, self._protocols)
        masks = _predict(predictor, volume, prompts, shown["window"])
        for protocol, label in itertools.product(self._protocols, volume.present):
            prediction = np.zeros(volume.labels[FIRST].shape, bool)
            for (number, *key), mask in masks.items():
                if key == [label, protocol]:
                    prediction[number] = mask
            for reference in volume.labels:
                fields = _fields(volume.case, label, reference, protocol)
                row = self._score_object(volume, prediction, fields | shown)
                # Another annotator's largest slice may hold nothing of the first annotator's.
                prompt = prompts.get((row.slice_index, label, protocol), Prompt())
                entry.objects.append(dataclasses.replace(row, **prompt_fields(prompt)))
                entry.slices.extend(self._score_slices(volume, prediction, fields))
        return entry

    def _score_annotators(self, index: int) -> Entry:
        """Scores annotators against each other; pictures show CT in the case's window."""
        volume = _read(self.cases[index], self._labels)
        entry = Entry(_state(volume.case), [])
        for name, reference in itertools.permutations(volume.labels, 2):
            for label in volume.present:
                fields = _fields(volume.case, label, reference, self._protocols[0])
                fields |= {"recipe": "lite", "window": volume.case.window}
                fields["checkpoint"] = f"annotator {name}"
                prediction = volume.labels[name] == label
                entry.objects.append(self._score_object(volume, prediction, fields))
        return entry

    def _score_object(
        self, volume: _Volume, prediction: np.ndarray, fields: dict[str, Any]
    ) -> ObjectScore:
        """Scores one object in the dimensions of its scan."""
        truth = volume.labels[fields["reference"]] == fields["label"]
        seen = truth if truth.any() else prediction
        largest = int(seen.sum(axis=(1, 2)).argmax())
        masks, spacing, unit = (prediction, truth), volume.spacing, "mm"
        if len(volume.image) == 1:  # a picture
            masks, spacing, unit = (prediction[0], truth[0]), PIXELS, "px"
        burden = {
            f"{side}_{name}": value
            for side, mask in (("truth", truth), ("predicted", prediction))
            if self._burden
            for name, value in lesion_size.measure(mask, volume.spacing).items()
        }
        shown = {"unit": unit, "slice_index": largest, "runs": encode_runs(prediction[largest])}
        return self._object_score(*masks, spacing, burden=burden, **shown, **fields)

    def _score_slices(
        self, volume: _Volume, prediction: np.ndarray, fields: dict[str, Any]
    ) -> Iterator[ObjectScore]:
        """Scores each slice with truth or prediction, in pixels."""
        truth = volume.labels[fields["reference"]] == fields["label"]
        for number in np.flatnonzero((truth | prediction).any(axis=(1, 2))):
            place = {"unit": "px", "slice_index": int(number)}
            yield self._object_score(prediction[number], truth[number], PIXELS, **place, **fields)


def _read(case: Case, labels: Collection[int]) -> _Volume:
    """Reads a case and its masks; `labels` are those that it must have, empty for any."""
    try:
        scan = read_scan(case.image)
        log_notes(scan)
        axis = slice_axis(scan)
        _check_spacing(case.image, scan.spacing, is_volume=scan.array.shape[axis] > 1)
        masks = {name: read_mask_scan(path, scan) for name, path in case.masks.items()}
    except UserError as error:
        raise UserError(f"{case.name}: {error}") from None
    for mask in masks.values():
        log_notes(mask)
    masks = {name: np.moveaxis(mask.array, axis, 0) for name, mask in masks.items()}
    present = [int(n) for n in np.unique(masks[FIRST]) if n and n not in case.ignore]
    if absent := [label for label in labels if label not in present]:
        raise UserError(
            f"{case.name}: --labels {absent[0]} is not in {case.masks[FIRST]}, which has "
            f"{present}; leave the case or the label out"
        )
    image = np.moveaxis(scan.array, axis, 0)
    return _Volume(case, image, masks, slice_spacing(scan, axis), tuple(labels or present))


def _draw_prompts(volume: _Volume, protocols: Sequence[Protocol]) -> dict[_Key, Prompt]:
    """Draws prompts for every slice of every object, in pixels of the slice, by slice."""
    case = zlib.crc32(volume.case.name.encode())  # not its row: rows may come and go
    return {
        (number, label, protocol): protocol.draw(plane == label, (case, number, label))
        for number, plane in enumerate(volume.labels[FIRST])
        for label in volume.present
        if (plane == label).any()
        for protocol in protocols
    }


def _predict(
    predictor: SlicePredictor, volume: _Volume, prompts: dict[_Key, Prompt], window: str
) -> dict[_Key, np.ndarray]:
    """Returns the mask [Y, X] for each prompt; a slice is embedded once for all of its own."""
    case, recipe = volume.case, get_recipe(predictor.preprocessing.recipe)
    for doubt in doubts(volume.image, case.modality, recipe):
        log.warning("%s: %s: %s", case.name, case.image, doubt)
    try:
        grey = normalise_intensity(volume.image, case.modality, recipe, window)
    except UserError as error:
        raise UserError(f"{case.name}: {case.image}: {error}") from None

    def tasks() -> Iterator[SliceTask]:
        for number, keys in itertools.groupby(prompts, lambda key: key[0]):
            image, valid_shape = resize_image(grey[number], recipe)
            asked = [prompts[key] for key in keys]
            yield SliceTask(f"{case.name}, slice {number}", image, valid_shape, asked)

    batches = predictor.run(tasks(), volume.image.shape[1:3])
    masks = (mask for batch in batches for of_slice in batch for mask in of_slice)
    return dict(zip(prompts, masks, strict=True))


def _fields(case: Case, label: int, reference: str, protocol: Protocol) -> dict[str, Any]:
    """Returns the names of a row: whose object, which annotator's mask, how it was prompted."""
    names = {"case_id": case.case_id, "task": case.task, "modality": case.modality}
    names |= {"reference": reference, "label": label}
    return names | {"prompt": protocol.prompt, "box_shift": protocol.box_shift}


def _check_spacing(image: str, spacing: Sequence[float], is_volume: bool) -> None:
    """Raises UserError unless it is positive mm, or, in a picture, unknown (NaN)."""
    spacing = [float(mm) for mm in spacing]
    if not all(0 < mm < np.inf or (np.isnan(mm) and not is_volume) for mm in spacing):
        raise UserError(
            f"{image}: has the spacing {spacing} (z, y, x); 3D scores need positive mm: "
            "save the volume in a format with geometry"
        )


def _state(case: Case) -> str:
    """Returns a digest of a case's row in the manifest and of its files' times."""
    paths = (case.image, *case.masks.values())
    times = [Path(split_series(path)[0]).stat().st_mtime_ns for path in paths]
    fields = [case.case_id, case.image, case.masks, case.modality, case.task, case.window]
    fields += [case.ignore] if case.ignore else []
    return sha256_of_json([fields, times])[:16]
