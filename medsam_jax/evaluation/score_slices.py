"""Scores checkpoints on the slices of a built data set: natively in 2D, in pixels.

Every (slice, label) object is one row. Slices are read once per checkpoint, embedded once, and
answer all their prompts. Rows reach the disk batch by batch (`journal`), so the same command goes
on after a kill. With several hosts each scores its share of the slices.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsam_jax.cli import progress
from medsam_jax.data.input_pipeline import open_dataset
from medsam_jax.data.preprocess import Preprocessing, check_compatible
from medsam_jax.distributed import wait_for_all
from medsam_jax.drawing import overlay, window_around
from medsam_jax.errors import UserError
from medsam_jax.evaluation.journal import Journal, Row, checkpoint_identity
from medsam_jax.evaluation.manifest import FIRST
from medsam_jax.evaluation.protocol import Prompt, Protocol
from medsam_jax.evaluation.scoring import decode_runs, encode_runs
from medsam_jax.hub import load_model
from medsam_jax.inference.slice_predictor import SlicePredictor, SliceTask
from medsam_jax.metrics import mask_scores

PIXELS = (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class _Object:
    """An object of a slice under one protocol."""

    position: int  # of the slice in the split
    label: int
    protocol: Protocol
    prompt: Prompt  # pixels of the stored slice
    truth: np.ndarray  # bool, on the valid part
    record: dict[str, Any]

    @property
    def name(self) -> str:
        case, number = self.record["case_id"], int(self.record["slice_index"])
        return f"case {_text(case)}, slice {number}, label {self.label}"


class SplitEvaluation:
    """Scores of several checkpoints on one split, under the same prompts.

    Args:
      data_dir, split: see `open_dataset`.
      protocols: how to prompt; all with one `prompt` and seed.
      tolerance: of the NSD, pixels of the stored slice.
      batch_size: slices at a time.
      output: folder; `parts/` in it holds the rows as they come.

    Raises:
      UserError: no such data set or split.
    """

    unit, scoring = "px", "slices in 2D, in pixels of the stored grid"

    def __init__(
        self,
        data_dir: str,
        split: str,
        protocols: Sequence[Protocol],
        tolerance: float,
        batch_size: int,
        output: Path,
    ):
        self._source, self.info = open_dataset(data_dir, split)
        self._positions, self._labels = self.info.objects(split)
        self._protocols, self._tolerance = protocols, tolerance
        self._batch_size, self._output = batch_size, output
        self._split = split
        self.title = f"split `{split}` of `{self.info.directory}`, recipe {self.info.recipe}"

    slice_rows = ()  # here every object is a slice's

    def evaluate_annotators(self) -> list[Row]:
        """None: a data set holds one mask for each object."""
        return []

    def check(self, checkpoint: str, preprocessing: Preprocessing) -> None:
        """Raises UserError for a checkpoint of another recipe than the data set's."""
        try:
            check_compatible(self.info, preprocessing)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None

    def window_note(self, preprocessing: Preprocessing) -> str:
        """Says so where slices show CT in another window than those it was trained on, else "".

        A note only: such a model is worth scoring beside one that was trained on these slices.
        """
        shown = self.info.ct_windows(self._split)
        trained = preprocessing.ct_windows or (preprocessing.ct_window(),)
        if set(shown) <= set(trained):
            return ""
        return f"CT is shown in window {', '.join(shown)}, expected in {', '.join(trained)}"

    def evaluate(self, checkpoint: str) -> list[Row]:
        """Rows of every object, those of an earlier run included, in the order of the data.

        Raises:
          UserError: another recipe than the data set's, or an output that is not finite.
        """
        journal = Journal(self._output / "parts", self._identity(checkpoint), jax.process_index())
        done = {_key(row) for row in journal.rows()}
        wait_for_all(f"read what is scored of {checkpoint}")  # before any process writes more
        wanted = [
            int(position)
            for position in np.unique(self._positions)
            if not done.issuperset(self._keys(int(position)))
        ]
        share = wanted[jax.process_index() :: jax.process_count()]
        if share:
            model = load_model(checkpoint)
            self.check(checkpoint, model.config.preprocessing)
            predictor = SlicePredictor(model, min(self._batch_size, len(share)))
            self._score(predictor, share, journal)
        wait_for_all(f"evaluated {checkpoint}")
        common = {"checkpoint": checkpoint, "unit": self.unit}
        unique = {_key(row): common | row for row in journal.rows()}
        return [unique[key] for key in sorted(unique)]

    def picture(self, row: Row) -> np.ndarray:
        """The surroundings of a row's object, with truth, prediction and prompt."""
        record = self._source[row["position"]]
        height, width = (int(side) for side in record["valid_shape"])
        truth = record["mask"][:height, :width, 0] == row["label"]
        prediction = decode_runs(row["runs"], (height, width))
        rows, columns = window = window_around(np.stack([truth, prediction]))
        corner = np.array([columns.start, rows.start])
        box = np.array(row["box"]) - np.tile(corner, 2) if row["box"] else None
        points = np.array(row["points"]) - corner if row["points"] else None
        image = record["image"][:height, :width]
        return overlay(image[window], truth[window], prediction[window], box, points)

    def _score(self, predictor: SlicePredictor, positions: list[int], journal: Journal) -> None:
        objects: list[list[_Object]] = []  # of slices on their way through the model

        def tasks() -> Iterator[SliceTask]:
            for position in positions:
                found = list(self._objects(position))
                objects.append(found)
                yield _task(found)

        batches = -(-len(positions) // predictor.batch_size)
        for batch in progress(predictor.run(tasks()), f"{self._split} split", batches):
            finished = [objects.pop(0) for _ in batch]
            journal.append(
                self._row(one, mask)
                for found, masks in zip(finished, batch, strict=True)
                for one, mask in zip(found, masks, strict=True)
            )

    def _objects(self, position: int) -> Iterator[_Object]:
        record = self._source[position]
        height, width = (int(side) for side in record["valid_shape"])
        labels = record["mask"][:height, :width, 0]
        for label in self._labels[self._positions == position]:
            truth = labels == label
            if not truth.any():
                case = f"{_text(record['case_id'])}, slice {int(record['slice_index'])}"
                raise UserError(
                    f"{self.info.directory}: case {case}: label {label} is listed but has no "
                    "pixel; build the data set again"
                )
            for protocol in self._protocols:
                prompt = protocol.draw(truth, (position, int(label)))
                yield _Object(position, int(label), protocol, prompt, truth, record)

    def _row(self, one: _Object, prediction: np.ndarray) -> Row:
        prompt, record = one.prompt, one.record
        return {
            "prompt": one.protocol.prompt,
            "box_shift": one.protocol.box_shift,
            "case_id": _text(record["case_id"]),
            "task": _text(record["task"]),
            "modality": _text(record["modality"]),
            "slice_index": int(record["slice_index"]),
            "label": one.label,
            "reference": FIRST,
            "truth_size": int(np.count_nonzero(one.truth)),
            "predicted_size": int(np.count_nonzero(prediction)),
            **mask_scores(prediction, one.truth, PIXELS, self._tolerance),
            # Kept in the journal only, for pictures.
            "position": one.position,
            "box": None if prompt.box is None else prompt.box.tolist(),
            "points": None if prompt.points is None else prompt.points.tolist(),
            "runs": encode_runs(prediction),
        }

    def _keys(self, position: int) -> set[tuple[int, int, int]]:
        labels = self._labels[self._positions == position]
        return {(position, int(n), p.box_shift) for n in labels for p in self._protocols}

    def _identity(self, checkpoint: str) -> dict[str, Any]:
        record = self.info.record
        return {
            "checkpoint": checkpoint_identity(checkpoint),
            "data": [str(self.info.directory.resolve()), self._split, record["cases"]],
            "protocol": [self._protocols[0].prompt, self._protocols[0].seed],
            "tolerance": self._tolerance,
            "rows": 2,  # raise when their content changes
        }


JOURNAL_ONLY = ("position", "box", "points", "runs")


def _task(objects: list[_Object]) -> SliceTask:
    record = objects[0].record
    return SliceTask(
        name=objects[0].name,
        image=record["image"],
        valid_shape=tuple(int(side) for side in record["valid_shape"]),
        prompts=[one.prompt for one in objects],
    )


def _key(row: Row) -> tuple[int, int, int]:
    return row["position"], row["label"], row["box_shift"]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
