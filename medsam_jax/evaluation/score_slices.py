"""Scores checkpoints on the slices of a built data set: natively in 2D, in pixels.

Every (slice, label) object is one row. A slice is read and embedded once per checkpoint for all
its prompts.
"""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from medsam_jax.cli import progress
from medsam_jax.data.datasets import label_name, open_dataset
from medsam_jax.data.manifest import FIRST, case_hash, short_hash
from medsam_jax.data.preprocess import check_compatible
from medsam_jax.data.prompts import Prompt
from medsam_jax.data.recipes import Preprocessing
from medsam_jax.data.run_lengths import encode_runs
from medsam_jax.errors import UserError
from medsam_jax.evaluation.base import PIXELS, Entry, Evaluation, ObjectScore, prompt_fields
from medsam_jax.evaluation.statistics import grouped
from medsam_jax.inference.slice_predictor import SlicePredictor, SliceTask


class _Object(NamedTuple):
    """An object of a slice under one protocol."""

    prompt: Prompt  # pixels of the stored slice
    truth: np.ndarray  # bool, on the valid part
    fields: dict[str, Any]  # of its row, except for scores


class SplitEvaluation(Evaluation):
    """Scores checkpoints on one split; its items are the slices with an object.

    Args:
      data_dir, split: see `open_dataset`, also for the errors raised.
      settings: see `Evaluation`; shifts and tolerance are in pixels of the stored slice.
      fold, task: see `open_dataset` and `DatasetInfo.objects`.
      most: number of slices to score at most, evenly from each patient; None: all.
    """

    unit, scoring = "px", "slices in 2D, in pixels of the stored grid"
    columns = ("checkpoint", "unit", "prompt", "box_shift", "case_id", "task", "modality")
    columns += (
        "slice_index",
        "label",
        "label_name",
        "reference",
        "trained_on",
        "truth_size",
        "predicted_size",
    )

    def __init__(
        self,
        data_dir: str,
        split: str,
        *settings: Any,
        fold: str = "",
        task: str = "",
        most: int | None = None,
    ):
        super().__init__(*settings)
        self._source, self.info = open_dataset(data_dir, split, fold)
        self._positions, self._labels = self.info.objects(split, task)
        self.split, self._most = split, most
        self.title = f"split `{split}` of `{self.info.directory}`, recipe {self.info.recipe}"

    def items(self) -> dict[int | str, int]:
        """Returns the positions in the split of the slices with an object, `most` at most."""
        positions = np.unique(self._positions).tolist()
        if self._most is not None:
            patients = grouped(positions, self.patient_of).values()
            share = max(1, self._most // len(patients))
            shares = [one for members in patients for one in _evenly(members, share)]
            positions = sorted(_evenly(shares, self._most))
        return {position: position for position in positions}

    @property
    def slices(self) -> int:
        """Number of slices with an object, those beyond `most` too."""
        return len(np.unique(self._positions))

    def identity(self) -> dict[str, Any]:
        """Returns the data set, the split and its cases."""
        directory = str(self.info.directory.resolve())
        return {"data": [directory, self.split, self.info.record["cases"]]}

    def patients(self) -> dict[str, str]:
        name = self.info.record["name"]
        return {case["case_id"]: case_hash(name, case["case_id"]) for case in self._cases()}

    def patient_of(self, item: int) -> str:
        return self._patients[item]

    @functools.cached_property
    def _patients(self) -> list[str]:
        return [case["case_id"] for case in self._cases() for _ in range(case["slices"])]

    def label_name(self, task: str, label: int) -> str:
        return label_name(self.info.record, task, label)

    def image_hashes(self, patient: str) -> set[str]:
        scans = [case for case in self._cases() if case["case_id"] == patient]
        return {short_hash(case.get("image_sha256", "")) for case in scans}

    def _cases(self) -> list[dict[str, Any]]:
        return [case for case in self.info.record["cases"] if case["split"] == self.split]

    def check(self, checkpoint: str, preprocessing: Preprocessing) -> None:
        try:
            check_compatible(self.info, preprocessing)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None

    def window_note(self, preprocessing: Preprocessing) -> str:
        """Returns a note where slices show CT in another window than in training, else "".

        A note only: such a model is worth scoring beside one that was trained on these slices.
        """
        shown = self.info.ct_windows(self.split)
        trained = preprocessing.ct_windows or (preprocessing.ct_window(),)
        note = f"CT is shown in window {', '.join(shown)}, expected in {', '.join(trained)}"
        return "" if set(shown) <= set(trained) else note

    def score(self, predictor: SlicePredictor, items: Sequence[int]) -> Iterator[list[Entry]]:
        in_flight = collections.deque()  # slices on their way through the model

        def tasks() -> Iterator[SliceTask]:
            for position in items:
                objects, task = self.task(position)
                in_flight.append((position, objects))
                yield task

        batches = -(-len(items) // predictor.batch_size)
        for batch in progress(predictor.run(tasks()), f"{self.split} split", batches):
            yield [self._entry(*in_flight.popleft(), masks) for masks in batch]

    def show(self, row: ObjectScore) -> tuple[np.ndarray, np.ndarray]:
        """Returns the valid part of the stored slice, and the truth."""
        record = self._source[row.item]
        height, width = record["valid_shape"]
        return record["image"][:height, :width], record["mask"][:height, :width, 0] == row.label

    def task(self, position: int) -> tuple[list[_Object], SliceTask]:
        """Returns the objects of a slice, and what the model is asked about them."""
        record = self._source[position]
        objects = list(self._objects(position, record))
        return objects, SliceTask(
            name=f"{_name(record)}, label {objects[0].fields['label']}",
            image=record["image"],
            valid_shape=tuple(int(side) for side in record["valid_shape"]),
            prompts=[one.prompt for one in objects],
        )

    def _objects(self, position: int, record: dict[str, Any]) -> Iterator[_Object]:
        height, width = record["valid_shape"]
        labels = record["mask"][:height, :width, 0]
        names = {name: record[name].decode() for name in ("case_id", "task", "modality")}
        names |= {"slice_index": int(record["slice_index"]), "reference": FIRST, "unit": self.unit}
        for label in self._labels[self._positions == position].tolist():
            truth = labels == label
            if not truth.any():
                raise UserError(
                    f"{self.info.directory}: {_name(record)}: label {label} is listed but has no "
                    "pixel; build the data set again"
                )
            for protocol in self._protocols:
                prompt = protocol.draw(truth, (position, label))
                shift = {"prompt": protocol.prompt, "box_shift": protocol.box_shift}
                fields = names | {"label": label} | shift | prompt_fields(prompt)
                yield _Object(prompt, truth, fields)

    def _entry(self, position: int, objects: list[_Object], masks: list[np.ndarray]) -> Entry:
        rows = [
            self._object_score(mask, one.truth, PIXELS, runs=encode_runs(mask), **one.fields)
            for one, mask in zip(objects, masks, strict=True)
        ]
        return Entry(position, rows)


def _evenly(items: Sequence[int], most: int) -> list[int]:
    """Returns at most so many items, from the middles of as many equal parts."""
    if len(items) <= most:
        return list(items)
    return [items[int((part + 0.5) * len(items) / most)] for part in range(most)]


def _name(record: dict[str, Any]) -> str:
    return f"case {record['case_id'].decode()}, slice {int(record['slice_index'])}"
