"""Scores checkpoints on whole scans of a manifest: per object in 3D (mm), per slice in 2D (px).

Each slice that holds an object gets one prompt, drawn from the first annotator's mask; the answers
are put back into the scan's own grid and scored there, in the scan's spacing, against every
annotator. Pictures (one slice) are scored natively in 2D, in pixels. Rows reach the disk case by
case (`journal`): a kill loses at most one case. With several hosts each scores its share.
"""

import dataclasses
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsam_jax.data.preprocess import (
    Preprocessing,
    get_recipe,
    normalise_intensity,
    prompts_to_input,
    read_mask,
    read_scan,
    resize_image,
    slice_axis,
    slice_spacing,
)
from medsam_jax.distributed import wait_for_all
from medsam_jax.errors import UserError
from medsam_jax.evaluation import burden
from medsam_jax.evaluation.figures import overlay, window_around
from medsam_jax.evaluation.journal import Journal, Row, checkpoint_identity
from medsam_jax.evaluation.manifest import FIRST, Case, read_cases
from medsam_jax.evaluation.predictor import SlicePredictor, SliceTask
from medsam_jax.evaluation.protocol import Prompt, Protocol
from medsam_jax.evaluation.scoring import decode_runs, encode_runs
from medsam_jax.metrics import mask_scores
from medsam_jax.models.checkpoint import load_model
from medsam_jax.progress import progress

JOURNAL_ONLY = ("case_index", "box", "points", "runs")

_Key = tuple[int, int, Protocol]  # slice, label, how it was prompted


@dataclasses.dataclass(frozen=True)
class _Volume:
    """A case with its slices along the first axis."""

    case: Case
    image: np.ndarray  # [Z, Y, X] or [Z, Y, X, 3], as read
    labels: dict[str, np.ndarray]  # annotator -> label map [Z, Y, X]
    spacing: tuple[float, ...]  # mm
    present: tuple[int, ...]  # labels that are scored

    @property
    def is_picture(self) -> bool:
        return len(self.image) == 1

    def scored(self, mask: np.ndarray) -> np.ndarray:
        """The mask in the dimensions that are scored: pictures are 2D, never slabs."""
        return mask[0] if self.is_picture else mask

    @property
    def scored_spacing(self) -> tuple[float, ...]:
        return (1.0, 1.0) if self.is_picture else self.spacing


class VolumeEvaluation:
    """Scores of several checkpoints on the scans of a manifest, under the same prompts.

    Args:
      manifest, split: see `read_cases`.
      protocols: how to prompt; shifts are in pixels of the scan's own slices.
      tolerance: of the NSD: mm for volumes, pixels for slices and pictures.
      batch_size: slices at a time.
      output: folder; `parts/` in it holds the rows as they come.
      labels: labels that every case must have and that are scored; empty scores all there are.
      with_burden: whether rows hold volumes and diameters.

    Raises:
      UserError: a manifest that cannot be used, see `read_cases`.
    """

    unit, scoring = "mm (px for pictures)", "volumes in 3D, in mm; pictures and slices in 2D, in px"

    def __init__(
        self,
        manifest: str | Path,
        split: str | None,
        protocols: Sequence[Protocol],
        tolerance: float,
        batch_size: int,
        output: Path,
        labels: Sequence[int] = (),
        with_burden: bool = False,
    ):
        self.cases = read_cases(manifest, split)
        self._protocols, self._tolerance, self._labels = protocols, tolerance, tuple(labels)
        self._batch_size, self._output, self._burden = batch_size, output, with_burden
        self._split = split
        self.title = f"{len(self.cases)} scans of `{manifest}`" + (f", split {split}" * bool(split))
        self.slice_rows: list[Row] = []  # of everything evaluated so far

    def check(self, checkpoint: str, preprocessing: Preprocessing) -> None:
        """Any recipe will do: scans are prepared by the checkpoint's own."""

    def window_note(self, preprocessing: Preprocessing) -> str:
        """Nothing: scans are shown in the window of their case or of the checkpoint."""
        return ""

    def evaluate(self, checkpoint: str) -> list[Row]:
        """Rows of every object in 3D, those of an earlier run included, in the manifest's order.

        Raises:
          UserError: a scan or mask that cannot be used, or an output that is not finite; the case
            is named.
        """

        def work(todo: list[int], journal: Journal) -> None:
            predictor = SlicePredictor(load_model(checkpoint), self._batch_size)
            for index in progress(todo, "scans"):
                journal.append([self._score_case(predictor, index)])

        return self._rows(checkpoint, checkpoint_identity(checkpoint), work)

    def evaluate_annotators(self) -> list[Row]:
        """Rows of each annotator scored against each other one; none where there is only one."""
        if all(len(case.masks) < 2 for case in self.cases):
            return []

        def work(todo: list[int], journal: Journal) -> None:
            for index in progress(todo, "annotators"):
                journal.append([self._score_annotators(index)])

        return self._rows(None, ["annotators"], work)

    def picture(self, row: Row) -> np.ndarray:
        """The surroundings of a row's object, in the slice where it is largest."""
        volume = self._read(row["case_index"])
        index, label = row["slice_index"], row["label"]
        recipe = get_recipe("lite")
        image = normalise_intensity(volume.image, volume.case.modality, recipe, volume.case.window)[
            index
        ]
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        truth = volume.labels[row["reference"]][index] == label
        prediction = decode_runs(row["runs"], truth.shape)
        rows, columns = window = window_around(np.stack([truth, prediction]))
        corner = np.array([columns.start, rows.start])
        box = np.array(row["box"]) - np.tile(corner, 2) if row["box"] else None
        points = np.array(row["points"]) - corner if row["points"] else None
        return overlay(image[window], truth[window], prediction[window], box, points)

    def _rows(self, checkpoint: str | None, identity: list[Any], work: Any) -> list[Row]:
        """Runs `work` on the cases that no earlier run has finished; gathers all rows."""
        journal = Journal(self._output / "parts", self._identity(identity), jax.process_index())
        done = {entry["case"] for entry in journal.rows()}
        wait_for_all(f"read what is scored of {identity[0]}")  # before any process writes more
        keys = [_state(case) for case in self.cases]
        todo = [i for i, key in enumerate(keys) if key not in done]
        share = todo[jax.process_index() :: jax.process_count()]
        if share:
            work(share, journal)
        wait_for_all(f"evaluated {identity[0]}")
        entries = {entry["case"]: entry for entry in journal.rows()}
        name = {} if checkpoint is None else {"checkpoint": checkpoint}
        self.slice_rows += [name | row for key in keys for row in entries[key]["slices"]]
        return [
            name | row | {"case_index": index}
            for index, key in enumerate(keys)
            for row in entries[key]["objects"]
        ]

    def _identity(self, checkpoint: list[Any]) -> dict[str, Any]:
        return {
            "checkpoint": checkpoint,
            "protocols": [dataclasses.astuple(protocol) for protocol in self._protocols],
            "settings": [self._tolerance, self._labels, self._burden],
            "rows": 3,  # raise when their content changes
        }

    def _read(self, index: int) -> _Volume:
        case = self.cases[index]
        try:
            scan = read_scan(case.image)
            axis = slice_axis(scan)
            _check_spacing(case.image, scan.spacing, is_volume=scan.array.shape[axis] > 1)
            masks = {name: read_mask(path, scan) for name, path in case.masks.items()}
        except UserError as error:
            raise UserError(f"{case.name}: {error}") from None
        labels = {name: np.moveaxis(mask, axis, 0) for name, mask in masks.items()}
        present = [int(label) for label in np.unique(labels[FIRST]) if label]
        absent = [label for label in self._labels if label not in present]
        if absent:
            raise UserError(
                f"{case.name}: --labels {absent[0]} is not in {case.masks[FIRST]}, which has "
                f"{present}; leave the case or the label out"
            )
        image = np.moveaxis(scan.array, axis, 0)
        chosen = self._labels or tuple(present)
        return _Volume(case, image, labels, slice_spacing(scan, axis), chosen)

    def _score_case(self, predictor: SlicePredictor, index: int) -> Row:
        volume = self._read(index)
        entry: Row = {"case": _state(volume.case), "objects": [], "slices": []}
        prompts = self._prompts(volume)
        masks = self._predict(predictor, volume, prompts)
        for protocol, label in itertools.product(self._protocols, volume.present):
            prediction = np.zeros(volume.labels[FIRST].shape, bool)
            for (number, *key), mask in masks.items():
                if key == [label, protocol]:
                    prediction[number] = mask
            for reference in volume.labels:
                objects, slices = self._compare(volume, prediction, label, reference)
                common = self._common(volume, label, reference)
                common |= {"prompt": protocol.prompt, "box_shift": protocol.box_shift}
                # Another annotator's largest slice may be one that the first has nothing in.
                prompt = prompts.get((objects["slice_index"], label, protocol), Prompt())
                hidden = {
                    "box": None if prompt.box is None else prompt.box.tolist(),
                    "points": None if prompt.points is None else prompt.points.tolist(),
                }
                entry["objects"].append(common | objects | hidden)
                entry["slices"] += [common | one for one in slices]
        return entry

    def _score_annotators(self, index: int) -> Row:
        volume = self._read(index)
        entry: Row = {"case": _state(volume.case), "objects": [], "slices": []}
        for name, reference in itertools.permutations(volume.labels, 2):
            for label in volume.present:
                objects, _ = self._compare(volume, volume.labels[name] == label, label, reference)
                common = {"checkpoint": f"annotator {name}"}
                common |= self._common(volume, label, reference)
                common |= {"prompt": self._protocols[0].prompt}
                common |= {"box_shift": self._protocols[0].box_shift}
                hidden = {"box": None, "points": None}
                entry["objects"].append(common | objects | hidden)
        return entry

    def _common(self, volume: _Volume, label: int, reference: str) -> Row:
        case = volume.case
        names = {"case_id": case.case_id, "task": case.task, "modality": case.modality}
        return names | {"reference": reference, "label": label}

    def _prompts(self, volume: _Volume) -> dict[_Key, Prompt]:
        """In pixels of the slice, for every slice of every object; slice by slice."""
        case = zlib.crc32(volume.case.name.encode())  # not its row: rows may come and go
        return {
            (number, label, protocol): protocol.draw(plane == label, (case, number, label))
            for number, plane in enumerate(volume.labels[FIRST])
            for label in volume.present
            if (plane == label).any()
            for protocol in self._protocols
        }

    def _predict(
        self, predictor: SlicePredictor, volume: _Volume, prompts: dict[_Key, Prompt]
    ) -> dict[_Key, np.ndarray]:
        """The mask [Y, X] that answers each prompt; a slice is embedded once for all of its own."""
        keys = [list(group) for _, group in itertools.groupby(prompts, lambda key: key[0])]
        tasks = self._tasks(predictor.preprocessing, volume, prompts, keys)
        answers = predictor.run(tasks, volume.labels[FIRST].shape[1:])
        masks = itertools.chain.from_iterable(itertools.chain.from_iterable(answers))
        return dict(zip(prompts, masks, strict=True))

    def _tasks(
        self,
        preprocessing: Preprocessing,
        volume: _Volume,
        prompts: dict[_Key, Prompt],
        keys: list[list[_Key]],
    ) -> Iterator[SliceTask]:
        recipe = get_recipe(preprocessing.recipe)
        case, shape = volume.case, volume.image.shape[1:3]
        try:
            window = preprocessing.ct_window(case.window)
            grey = normalise_intensity(volume.image, case.modality, recipe, window)
        except UserError as error:
            raise UserError(f"{case.name}: {case.image}: {error}") from None
        for slice_keys in keys:
            number = slice_keys[0][0]
            image, valid_shape = resize_image(grey[number], recipe)
            moved = [_to_input(prompts[key], shape, preprocessing) for key in slice_keys]
            yield SliceTask(f"{case.name}, slice {number}", image, valid_shape, moved)

    def _compare(
        self, volume: _Volume, prediction: np.ndarray, label: int, reference: str
    ) -> tuple[Row, list[Row]]:
        """Scores of one object, and of its slices, against one annotator."""
        truth = volume.labels[reference] == label
        largest = int(truth.sum(axis=(1, 2)).argmax())
        if not truth.any():
            largest = int(prediction.sum(axis=(1, 2)).argmax())
        row = {
            "unit": "px" if volume.is_picture else "mm",
            "slice_index": largest,
            "truth_size": int(np.count_nonzero(truth)),
            "predicted_size": int(np.count_nonzero(prediction)),
            **mask_scores(
                volume.scored(prediction),
                volume.scored(truth),
                volume.scored_spacing,
                self._tolerance,
            ),
            "runs": encode_runs(prediction[largest]),
        }
        if self._burden:
            for name, mask in (("truth", truth), ("predicted", prediction)):
                measured = burden.measure(mask, volume.spacing)
                row |= {f"{name}_{measure}": value for measure, value in measured.items()}
        slices = [
            {
                "unit": "px",
                "slice_index": int(number),
                "truth_size": int(np.count_nonzero(truth[number])),
                "predicted_size": int(np.count_nonzero(prediction[number])),
                **mask_scores(prediction[number], truth[number], (1.0, 1.0), self._tolerance),
            }
            for number in np.flatnonzero((truth | prediction).any(axis=(1, 2)))
        ]
        return row, slices


def _check_spacing(image: str, spacing: Sequence[float], is_volume: bool) -> None:
    """Raises UserError unless it is positive mm, or, in a picture, unknown (NaN)."""
    spacing = np.asarray(spacing, float)
    if not ((spacing > 0) | (np.isnan(spacing) & (not is_volume))).all() or np.isinf(spacing).any():
        raise UserError(
            f"{image}: has the spacing {spacing.tolist()} (z, y, x); 3D scores need positive mm: "
            "save the volume in a format with geometry"
        )


def _state(case: Case) -> str:
    """Digest of what a case's rows depend on: its row of the manifest and its files' times."""
    paths = (case.image, *case.masks.values())
    times = [Path(path.split("#")[0]).stat().st_mtime_ns for path in paths]
    text = json.dumps([dataclasses.astuple(case), times], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _to_input(prompt: Prompt, shape: tuple[int, int], preprocessing: Preprocessing) -> Prompt:
    """Pixels of a scan's slice to pixels of the encoder input."""
    if prompt.box is not None:
        corners = prompts_to_input(prompt.box.reshape(2, 2), shape, preprocessing)
        return dataclasses.replace(prompt, box=corners.reshape(4).astype(np.float32))
    points = prompts_to_input(prompt.points, shape, preprocessing)
    return dataclasses.replace(prompt, points=points.astype(np.float32))
