"""Shared by both evaluation routes: typed rows, the journal of finished work, the loop over it.

A route (`score_slices`, `score_scans`) says which items there are, how one is scored and how it is
shown. Rows reach the disk as items are finished, so the same command continues after a kill. With
several hosts each scores its share of the items.
"""

import abc
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from medsam_jax.data.prompts import Prompt
from medsam_jax.data.recipes import Preprocessing
from medsam_jax.data.run_lengths import decode_runs
from medsam_jax.distributed import wait_for_all
from medsam_jax.drawing import overlay, window_around
from medsam_jax.errors import disk_space
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.hub import load_model, resolve
from medsam_jax.inference.slice_predictor import SlicePredictor
from medsam_jax.io.files import sha256_of_json
from medsam_jax.metrics import mask_scores
from medsam_jax.metrics.checks import Spacing
from medsam_jax.models.checkpoint import build_model, read_params
from medsam_jax.models.sam import SamConfig
from medsam_jax.models.unet import UNetConfig

PIXELS = (1.0, 1.0)  # spacing of scores in pixels
_ROWS_VERSION = 4  # raise when the content of rows changes: old journals are then not read


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectScore:
    """Scores of one object, in a volume or in one slice, against one annotator's mask."""

    checkpoint: str = ""  # or "annotator NAME"; the journal leaves a checkpoint's name out
    case_id: str  # the patient
    task: str
    modality: str
    slice_index: int  # of a volume: where the object is largest
    label: int
    label_name: str = ""  # given at the build or by --labels, else the number
    reference: str  # the annotator whose mask is the truth
    trained_on: str = ""  # "train" or "tune" where the checkpoint has seen the patient
    prompt: str
    box_shift: int
    unit: str  # of distances and the tolerance: mm or px
    truth_size: int  # pixels or voxels
    predicted_size: int
    scores: dict[str, float]  # by the names of `METRICS`
    burden: dict[str, float] = dataclasses.field(default_factory=dict)  # see `burden_report.NAMES`
    # For pictures; no columns of tables.
    item: int = -1  # place of the slice in its split, of the case in its manifest
    box: list[float] | None = None
    points: list[list[float]] | None = None
    runs: list[int] = dataclasses.field(default_factory=list)  # of the prediction in the slice
    recipe: str | None = None  # how a scan was shown to the model
    window: str | None = None  # CT window that it was shown in

    def table_row(self, columns: Sequence[str]) -> dict[str, Any]:
        """Returns the named fields, then scores and burden, as a row of a CSV file."""
        return {name: getattr(self, name) for name in columns} | self.scores | self.burden


@dataclasses.dataclass(frozen=True)
class Entry:
    """Rows of one finished item, as the journal keeps them."""

    key: int | str  # what the item's rows depend on, beside the journal's identity
    objects: list[ObjectScore]
    slices: list[ObjectScore] = dataclasses.field(default_factory=list)


class Journal:
    """JSON lines of one checkpoint under fixed settings, in `directory`.

    Every process appends to a file of its own and reads all of them. A line that a kill cut short
    is dropped. The files are named by a digest of `identity`, so no other results are ever read.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], process: int = 0):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._stem = sha256_of_json(identity)[:16]
        self._path = directory / f"{self._stem}-{process}.jsonl"
        if self._path.exists():
            content = self._path.read_bytes()
            os.truncate(self._path, content.rfind(b"\n") + 1)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the lines of all processes so far, in no order."""
        rows = []
        for path in sorted(self._directory.glob(f"{self._stem}-*.jsonl")):
            with path.open() as file:
                rows += [json.loads(line) for line in file if line.endswith("\n")]
        return rows

    def append(self, rows: Iterable[Any]) -> None:
        """Writes dictionaries or dataclasses to disk. Raises UserError where the disk is full."""
        with disk_space(self._path), self._path.open("a") as file:
            file.writelines(json.dumps(row, default=vars) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


class Evaluation(abc.ABC):
    """Scores several checkpoints on the same objects with the same prompts.

    Args:
      protocols: how to prompt; for `write_report`, all with one `prompt` and seed.
      tolerance: of the NSD, in the unit of the scores.
      batch_size: slices at a time; None: 8, on a CPU one, where more gain nothing.
      output: folder; `parts/` in it holds the journals.
    """

    unit: ClassVar[str]  # of the tolerance, for the reader
    scoring: ClassVar[str]  # what is scored, for the reader
    columns: ClassVar[tuple[str, ...]]  # of per_object.csv, before the scores
    title: str

    def __init__(
        self, protocols: Sequence[Protocol], tolerance: float, batch_size: int | None, output: Path
    ):
        self.tolerance, self.output = tolerance, output
        self._protocols = protocols
        self._batch_size = batch_size or (1 if jax.default_backend() == "cpu" else 8)
        self.slice_rows: list[ObjectScore] = []  # of everything evaluated so far

    @abc.abstractmethod
    def items(self) -> dict[int | str, int]:
        """Returns all items in order, by the keys of their entries."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns everything else that the rows of all items depend on."""

    @abc.abstractmethod
    def score(self, predictor: SlicePredictor, items: Sequence[int]) -> Iterator[list[Entry]]:
        """Scores items in order; entries come as often as they are to be written to disk.

        Raises UserError for bad data or an output that is not finite; the case is named.
        """

    @abc.abstractmethod
    def show(self, row: ObjectScore) -> tuple[np.ndarray, np.ndarray]:
        """Returns the slice [H, W] or [H, W, 3] of a row as the model saw it, and the truth."""

    def check(self, checkpoint: str, preprocessing: Preprocessing) -> None:  # noqa: B027
        """Raises UserError for a checkpoint that cannot be scored on these data."""

    def window_note(self, preprocessing: Preprocessing) -> str:
        """Returns a note where CT is shown in another window than in training, else ""."""
        return ""

    @abc.abstractmethod
    def patients(self) -> dict[str, str]:
        """Returns the `case_hash` of every patient that is scored, by case id."""

    def patients_of_split(self, split: str) -> set[str]:
        """Returns the patients that `--split` would choose of those scored; none where unknown."""
        return set()

    @abc.abstractmethod
    def patient_of(self, item: int) -> str:
        """Returns the case id of an item."""

    @abc.abstractmethod
    def label_name(self, task: str, label: int) -> str:
        """Returns the name of a label, its number where it has none."""

    @abc.abstractmethod
    def image_hashes(self, patient: str) -> set[str]:
        """Returns the `short_hash` of each scan of a patient; may read the scans."""

    def evaluate(
        self,
        checkpoint: str,
        patients: Collection[str] | None = None,
        model_config: SamConfig | UNetConfig | None = None,
    ) -> list[ObjectScore]:
        """Returns rows of every object in order, those of an earlier run too. Raises as `score`.

        With `patients`, the objects of these alone. With `model_config`, the checkpoint's arrays
        are scored under that config, as at step 0 of a run that set another contract.
        """

        def score(items: list[int]) -> Iterator[list[Entry]]:
            model = _load(checkpoint, model_config)
            self.check(checkpoint, model.config.preprocessing)
            yield from self.score(SlicePredictor(model, self._batch_size), items)

        facts = checkpoint_identity(checkpoint) + ([repr(model_config)] if model_config else [])
        return self._rows(checkpoint, facts, score, patients)

    def evaluate_annotators(self) -> list[ObjectScore]:
        """Returns rows of each annotator against each other one; none where there is only one."""
        return []

    def picture(self, row: ObjectScore) -> np.ndarray:
        """Draws the surroundings of a row's object with truth, prediction and prompt."""
        return draw_object(*self.show(row), [row])[1]

    def _rows(
        self,
        checkpoint: str | None,
        checkpoint_facts: list[Any],
        score: Callable[[list[int]], Iterator[list[Entry]]],
        patients: Collection[str] | None = None,
    ) -> list[ObjectScore]:
        """Scores the items that no earlier run has finished and returns the rows of all."""
        identity = self.identity() | {
            "checkpoint": checkpoint_facts,
            "protocols": [dataclasses.astuple(protocol) for protocol in self._protocols],
            "tolerance": self.tolerance,
            "rows": _ROWS_VERSION,
        }
        process, processes = jax.process_index(), jax.process_count()
        journal = Journal(self.output / "parts", identity, process)
        done = {entry["key"] for entry in journal.rows()}
        wait_for_all(f"read what is scored of {checkpoint_facts[0]}")  # before any writes more
        items = self.items()
        if patients is not None:
            items = {key: one for key, one in items.items() if self.patient_of(one) in patients}
        share = [item for key, item in items.items() if key not in done][process::processes]
        if share:
            for entries in score(share):
                journal.append(entries)
        wait_for_all(f"evaluated {checkpoint_facts[0]}")
        entries = {entry["key"]: entry for entry in journal.rows()}
        name = {} if checkpoint is None else {"checkpoint": checkpoint}

        def gather(kind: str) -> list[ObjectScore]:
            return [
                ObjectScore(
                    **row
                    | name
                    | {"item": item, "label_name": self.label_name(row["task"], row["label"])}
                )
                for key, item in items.items()
                for row in entries[key][kind]
            ]

        self.slice_rows += gather("slices")
        return gather("objects")

    def _object_score(
        self, prediction: np.ndarray, truth: np.ndarray, spacing: Spacing, **fields: Any
    ) -> ObjectScore:
        return ObjectScore(
            truth_size=int(np.count_nonzero(truth)),
            predicted_size=int(np.count_nonzero(prediction)),
            scores=mask_scores(prediction, truth, spacing, self.tolerance),
            **fields,
        )


def _load(checkpoint: str, model_config: SamConfig | UNetConfig | None) -> nnx.Module:
    if model_config is None:
        return load_model(checkpoint)
    return build_model(model_config, read_params(resolve(checkpoint)), checkpoint)


def draw_object(
    image: np.ndarray, truth: np.ndarray, rows: Sequence[ObjectScore]
) -> list[np.ndarray]:
    """Draws the surroundings of the object of all rows: bare, then with each row's prediction.

    Args:
      image, truth: of `Evaluation.show`.
      rows: of the same object and prompt, by several models.
    """
    predictions = [decode_runs(row.runs, truth.shape) for row in rows]
    window = window_around(np.stack([truth, *predictions]))
    corner = np.array([window[1].start, window[0].start])
    box = np.array(rows[0].box) - np.tile(corner, 2) if rows[0].box else None
    points = np.array(rows[0].points) - corner if rows[0].points else None
    image, truth = image[window], truth[window]
    drawn = [overlay(image, truth, one[window], box, points) for one in predictions]
    return [overlay(image), *drawn]


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """Returns the fields of a row that show how it was prompted."""
    return {
        "box": None if prompt.box is None else prompt.box.tolist(),
        "points": None if prompt.points is None else prompt.points.tolist(),
    }


def checkpoint_identity(name_or_dir: str) -> list[Any]:
    """Returns a directory with the sizes and times of its files; known weights' name is enough."""
    directory = Path(name_or_dir)
    if not directory.is_dir():
        return [name_or_dir]
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    facts = [[str(p.relative_to(directory)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return [str(directory.resolve()), facts]
