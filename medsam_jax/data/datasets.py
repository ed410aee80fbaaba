"""Opens a built `medical_slices` data set: finds its folder, reads its record and its slices."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medsam_jax.data.manifest import DATA_SET
from medsam_jax.data.modality import CT_WINDOWS, is_ct
from medsam_jax.data.recipes import get_recipe
from medsam_jax.data.splits import ALL, SPLITS, fold_splits
from medsam_jax.errors import UserError
from medsam_jax.io.files import plain_path, sha256_of_json

RECORD_FILE = "medical_slices.json"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A built data set's folder and its record (`medical_slices.json`), maybe in other splits."""

    directory: pathlib.Path
    record: dict[str, Any]
    stored: dict[str, Any] | None = None  # the record on disk, where `record` has other splits

    @property
    def recipe(self) -> str:
        """Name of the recipe that made the slices."""
        return self.record["recipe"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the record: recipe, tools, cases and their counts, drops."""
        return sha256_of_json(self.stored or self.record)

    @property
    def counts(self) -> dict[str, Any]:
        """Cases, slices and objects by split, and in each by task and modality."""
        return self.record["splits"]

    def with_splits(self, splits: Mapping[str, str]) -> "DatasetInfo":
        """Returns the same slices in the split that is named for each case id."""
        cases = [case | {"split": splits[case["case_id"]]} for case in self.record["cases"]]
        counts = {}
        for split in dict.fromkeys(case["split"] for case in cases):
            members = [case for case in cases if case["split"] == split]
            counts[split] = {
                "cases": len({case["case_id"] for case in members}),
                "slices": sum(case["slices"] for case in members),
                "objects": sum(len(kept) for case in members for kept in case["objects"]),
            }
        record = self.record | {"cases": cases, "splits": counts}
        return dataclasses.replace(self, record=record, stored=self.stored or self.record)

    def in_fold(self, fold: str) -> "DatasetInfo":
        """Returns the splits of a fold such as "2/5", the stored ones for "". Raises UserError."""
        patients = [case["case_id"] for case in self.record["cases"]]
        return self.with_splits(fold_splits(self.record["name"], patients, fold)) if fold else self

    def stored_positions(self, split: str) -> np.ndarray:
        """Returns the positions of a split's slices among those of all stored splits, in order."""
        splits = [case["split"] for case in self.record["cases"] for _ in range(case["slices"])]
        return np.flatnonzero(np.array(splits) == split)

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
        if self.stored:
            cases = [case for case in self.record["cases"] if case["split"] == split]
            slices = enumerate(kept for case in cases for kept in case["objects"])
            pairs = [(position, label) for position, kept in slices for label, _ in kept]
            positions, labels = np.array(pairs, int).reshape(-1, 2).T
        else:
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
            "medsam-jax build --manifest cases.csv --data_dir " + str(root)
        )
    names = ", ".join(info.recipe for info in infos)
    matching = [info for info in infos if recipe in (None, info.recipe)]
    if not matching:
        raise UserError(
            f"{root}: was built with recipe {names}, recipe {recipe} is needed; build it with "
            f"medsam-jax build --recipe {recipe}"
        )
    if len(matching) > 1:
        raise UserError(f"{root}: holds several data sets ({names}); name the folder of one")
    return matching[0]


def data_set_of(manifest: str | pathlib.Path) -> str:
    """Returns the name of the data set that a manifest lies beside, else the default name."""
    return _record_beside(manifest).get("name", DATA_SET)


def mask_label_names(manifest: str | pathlib.Path) -> dict[tuple[str, int], str]:
    """Returns names of the masks' labels by task and number, of the data set beside a manifest."""
    return {
        (task, entry["original"]): entry["name"]
        for task, labels in _record_beside(manifest).get("labels", {}).items()
        for entry in labels.values()
        if "original" in entry
    }


def label_name(record: Mapping[str, Any], task: str, label: int) -> str:
    """Returns the name of a stored label: its own, or that of the label it is an instance of.

    A label that the build gave no name has its number in the masks.
    """
    labels = record.get("labels", {}).get(task, {})
    if str(label) not in labels and "above" in labels:
        label = labels["above"]["instances_of"]
    return labels.get(str(label), {}).get("name", str(label))


def _record_beside(manifest: str | pathlib.Path) -> dict[str, Any]:
    record = pathlib.Path(manifest).parent / RECORD_FILE
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def open_dataset(
    data_dir: str | pathlib.Path, split: str, fold: str = ""
) -> tuple[Sequence[dict[str, Any]], DatasetInfo]:
    """Returns a split's records by random access (TFDS, ArrayRecord), and the data set's info.

    Split `ALL` has the slices of every split. With a fold such as "2/5" splits are those of the
    fold (`fold_splits`).

    A record is a dict: `image` uint8 [S, S, 3], `mask` uint8 [S, S, 1] label map, `case_id`, `task`
    and `modality` bytes, `slice_index`, `spacing` float32 [2] (row, column, mm, NaN where unknown),
    `original_shape` and `valid_shape` int32 [2]. Raises UserError for no such data set or split.
    """
    info = find_dataset(data_dir).in_fold(fold)
    if split == ALL:
        info = info.with_splits(dict.fromkeys((c["case_id"] for c in info.record["cases"]), ALL))
    available = [name for name, counts in info.counts.items() if counts["slices"]]
    if split not in available:
        raise UserError(
            f"{info.directory}: split {split!r} has no slices; it has {', '.join(available)} "
            "(small data sets: assign splits in the manifest's split column)"
        )
    import tensorflow_datasets as tfds

    skip = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    builder = tfds.builder_from_directory(plain_path(info.directory))
    stored = [split] if info.stored is None else [s for s in SPLITS if s in builder.info.splits]
    records = _Records([builder.as_data_source(one, decoders=skip) for one in stored])
    return (Chosen(records, info.stored_positions(split)) if info.stored else records), info


class Chosen(Sequence):
    """Items of a sequence at the given positions. Picklable, for workers."""

    def __init__(self, items: Sequence[Any], positions: np.ndarray):
        self._items, self._positions = items, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: Any) -> Any:
        return self._items[int(self._positions[int(position)])]


class _Records(Sequence):
    """TFDS data sources, one after another, with PNGs decoded by OpenCV; picklable, for workers.

    TFDS would repeat the channel of grey slices by `np.repeat`, which takes longer than decoding.
    """

    def __init__(self, sources: Sequence[Sequence[dict[str, Any]]]):
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: Any) -> dict[str, Any]:
        import cv2

        position = range(len(self))[int(position)]  # an IndexError ends iteration
        place = int(np.searchsorted(self._ends, position, side="right"))
        source = self._sources[place]
        record = source[position - int(self._ends[place]) + len(source)]
        image, mask = (
            cv2.imdecode(np.frombuffer(record[name], np.uint8), cv2.IMREAD_UNCHANGED)
            for name in ("image", "mask")
        )
        grey = image.ndim == 2
        image = cv2.merge([image] * 3) if grey else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return {**record, "image": image, "mask": mask[:, :, None]}
