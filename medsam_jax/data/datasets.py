"""Opens a built `medical_slices` data set: finds its folder, reads its record and its slices."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from medsam_jax.data.modality import CT_WINDOWS, is_ct
from medsam_jax.data.recipes import get_recipe
from medsam_jax.errors import UserError
from medsam_jax.io.files import plain_path, sha256_of_json

RECORD_FILE = "medical_slices.json"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A built data set's folder and its record (`medical_slices.json`)."""

    directory: pathlib.Path
    record: dict[str, Any]

    @property
    def recipe(self) -> str:
        """Name of the recipe that made the slices."""
        return self.record["recipe"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the record: recipe, tools, cases and their counts, drops."""
        return sha256_of_json(self.record)

    @property
    def counts(self) -> dict[str, Any]:
        """Cases, slices and objects by split, and in each by task and modality."""
        return self.record["splits"]

    def ct_windows(self, split: str, task: str = "") -> tuple[str, ...]:
        """Returns the windows in which a split's slices show CT, the most frequent first.

        With a task, of its cases only. CT from 8-bit files has no window.
        """
        names = {CT_WINDOWS[name]: name for name in get_recipe(self.recipe).ct_windows}
        slices = collections.Counter()
        for case in self.record["cases"]:
            if case["split"] == split and task in ("", case["task"]):
                name = names.get(tuple(case["intensity_limits"] or ()))
                if name and is_ct(case["modality"]):
                    slices[name] += case["slices"]
        return tuple(name for name, _ in slices.most_common())

    def objects(self, split: str, task: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Returns position of the slice in its split, and label, of every object of a split.

        With a task, of its objects only. Raises UserError as `groups`.
        """
        with np.load(self.directory / f"objects-{split}.npz") as file:
            positions, labels = file["position"], file["label"]
        if task:
            wanted = np.concatenate(list(self.groups(split, task).values()))
            chosen = np.isin(positions, wanted)
            positions, labels = positions[chosen], labels[chosen]
        return positions, labels

    def groups(self, split: str, task: str = "") -> dict[tuple[str, str], np.ndarray]:
        """Returns the positions of the slices of each (task, modality), in the order of the cases.

        With a task, of that one only. Raises UserError where the split has no slice of it.
        """
        groups: dict[tuple[str, str], list[int]] = {}
        start = 0
        for case in self.record["cases"]:
            if case["split"] == split:
                positions = range(start, start + case["slices"])
                groups.setdefault((case["task"], case["modality"]), []).extend(positions)
                start += case["slices"]
        chosen = {name: np.array(groups[name], int) for name in groups if task in ("", name[0])}
        if not sum(map(len, chosen.values())):
            tasks = ", ".join(sorted({name for name, _ in groups}))
            raise UserError(
                f"{self.directory}: split {split!r} has no slice of task {task!r}; it has {tasks}"
            )
        return chosen


def find_dataset(data_dir: str | pathlib.Path, recipe: str | None = None) -> DatasetInfo:
    """Finds the data set in `data_dir` (`--data_dir` of `datasets.build`, or a version folder).

    Raises UserError where there is none, only other recipes, or several and `recipe` is None.
    """
    root = pathlib.Path(data_dir)
    files = [*root.glob(RECORD_FILE)] or sorted(root.glob(f"medical_slices/*/*/{RECORD_FILE}"))
    infos = [DatasetInfo(f.parent, json.loads(f.read_text(encoding="utf-8"))) for f in files]
    if not infos:
        raise UserError(
            f"{root}: holds no medical_slices data set; build one with "
            "python -m datasets.build --manifest cases.csv --data_dir " + str(root)
        )
    names = ", ".join(info.recipe for info in infos)
    matching = [info for info in infos if recipe in (None, info.recipe)]
    if not matching:
        raise UserError(
            f"{root}: was built with recipe {names}, recipe {recipe} is needed; build it with "
            f"python -m datasets.build --recipe {recipe}"
        )
    if len(matching) > 1:
        raise UserError(f"{root}: holds several data sets ({names}); name the folder of one")
    return matching[0]


def open_dataset(
    data_dir: str | pathlib.Path, split: str
) -> tuple[Sequence[dict[str, Any]], DatasetInfo]:
    """Returns a split's records by random access (TFDS, ArrayRecord), and the data set's info.

    A record is a dict: `image` uint8 [S, S, 3], `mask` uint8 [S, S, 1] label map, `case_id`, `task`
    and `modality` bytes, `slice_index`, `spacing` float32 [2] (row, column, mm, NaN where unknown),
    `original_shape` and `valid_shape` int32 [2]. Raises UserError for no such data set or split.
    """
    info = find_dataset(data_dir)
    available = [name for name, counts in info.counts.items() if counts["slices"]]
    if split not in available:
        raise UserError(
            f"{info.directory}: split {split!r} has no slices; it has {', '.join(available)} "
            "(small data sets: assign splits in the manifest's split column)"
        )
    import tensorflow_datasets as tfds

    skip = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    builder = tfds.builder_from_directory(plain_path(info.directory))
    return _Records(builder.as_data_source(split, decoders=skip)), info


class _Records(Sequence):
    """TFDS data source that decodes PNGs with OpenCV; picklable, for workers.

    TFDS would repeat the channel of grey slices by `np.repeat`, which takes longer than decoding.
    """

    def __init__(self, source: Sequence[dict[str, Any]]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: Any) -> dict[str, Any]:
        import cv2

        record = self._source[range(len(self))[int(position)]]  # an IndexError ends iteration
        image, mask = (
            cv2.imdecode(np.frombuffer(record[name], np.uint8), cv2.IMREAD_UNCHANGED)
            for name in ("image", "mask")
        )
        grey = image.ndim == 2
        image = cv2.merge([image] * 3) if grey else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return {**record, "image": image, "mask": mask[:, :, None]}
