"""The manifest `cases.csv`: its rows, their splits, and the identity of a case.

The only reader of manifests: `datasets.build` and `medsam_jax.evaluate --manifest` accept the same
files and put every case into the same split.
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.data.splits import SEEN, SPLITS, assign_splits
from medsam_jax.errors import UserError, check_name
from medsam_jax.io.files import split_series, write_text

REQUIRED = ("case_id", "image", "mask", "modality", "task")
OPTIONAL = ("split", "window", "ignore")
ANNOTATOR = "mask_"  # columns `mask_NAME` hold the masks of further annotators
FIRST = "mask"  # name of the first annotator, whose masks are stored and make the prompts
DATA_SET = "medical_slices"  # default name of a data set; the name enters the split hash
_DIGITS = 16  # of a hash, in checkpoints
_COLUMNS = f"{','.join(REQUIRED)}[,split,window,ignore,{ANNOTATOR}NAME...]"
_DELIMITERS = ",;\t"  # Excel writes semicolons where a comma is the decimal sign


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a scan, its label maps, and what they show."""

    row: int  # line of the manifest; the header is line 1
    case_id: str  # the patient
    image: str  # absolute path; FOLDER#SERIES_UID chooses one DICOM series of several
    mask: str
    modality: str
    task: str
    split: str
    window: str | None  # CT window; None where the row names none
    annotators: tuple[tuple[str, str], ...] = ()  # (name, mask) of further annotators
    ignore: tuple[int, ...] = ()  # labels of the masks that are no objects, as nnU-Net's "ignore"

    @property
    def name(self) -> str:
        """Name of the case in messages; does not change when rows are added or removed."""
        return f"case {self.case_id} ({self.task}, {self.modality})"

    @property
    def row_name(self) -> str:
        """Name of the row in messages."""
        return f"row {self.row} (case {self.case_id})"

    @property
    def key(self) -> str:
        """Unique in a manifest: a patient may have several scans and tasks."""
        return f"{self.case_id}|{self.task}|{self.modality}"

    @property
    def masks(self) -> dict[str, str]:
        """Mask by annotator, the first annotator's first."""
        return {FIRST: self.mask, **dict(self.annotators)}

    def to_row(self) -> dict[str, str]:
        """Returns the values by column, for `write_manifest`."""
        fields = {name: getattr(self, name) or "" for name in (*REQUIRED, *OPTIONAL)}
        fields["ignore"] = " ".join(map(str, self.ignore))
        fields |= {name: kept_whole(fields[name]) for name in ("image", "mask")}
        return fields | {ANNOTATOR + name: kept_whole(file) for name, file in self.annotators}


def kept_whole(path: str) -> str:
    """Returns a path without space at its ends, which readers of a manifest take off."""
    path = path if path == path.lstrip() else f"./{path}"
    return path if path == path.rstrip() else f"{path}/."


def read_manifest(path: str | Path, data_set: str = DATA_SET) -> tuple[list[Case], list[str]]:
    """Reads a manifest in `cases.csv` form.

    Args:
      path: a UTF-8 CSV file; image and mask paths are relative to it.
      data_set: the name that enters the split hash.

    Returns:
      The well-formed cases, and one line for each row that is not.

    Raises:
      UserError: the file itself cannot be used: missing, not UTF-8, or a wrong header.
    """
    path = Path(path)
    (_, header), *rows = _read_rows(path)
    cases, problems = [], []
    for line, values in rows:
        fields = dict(zip(header, values, strict=False))
        if problem := _problem(header, values, fields):
            problems.append(f"{path} row {line}: {problem}")
        else:
            cases.append(_case(line, fields, path.parent.absolute()))
    conflicts = _conflicts(cases)
    problems += [f"{path} {line}" for line in conflicts.values()]
    cases = [case for case in cases if case.row not in conflicts]
    named = dict.fromkeys((case.case_id for case in cases), "")
    splits = assign_splits(data_set, named | {c.case_id: c.split for c in cases if c.split})
    return [dataclasses.replace(case, split=splits[case.case_id]) for case in cases], problems


def read_cases(path: str | Path, split: str | None = None, data_set: str = DATA_SET) -> list[Case]:
    """Reads the cases of one split, or of all splits, from a manifest without a defect.

    Raises:
      UserError: as `read_manifest`; also a row that cannot be used, a file that does not exist, an
        unknown split, or one without a case.
    """
    if split and split not in SPLITS:
        raise UserError(f"--split: {split!r} given; use one of {', '.join(SPLITS)}")
    cases, problems = read_manifest(path, data_set)
    chosen = [case for case in cases if split in (None, "", case.split)]
    problems += [
        f"{path} row {case.row}: {file} does not exist"
        for case in chosen
        for file in (case.image, *case.masks.values())
        if not os.path.exists(split_series(file)[0])
    ]
    if problems:
        raise UserError("; ".join(problems) + "; correct these rows")
    if not chosen:
        raise UserError(
            f"{path}: no case of split {split}, it has {count_splits(cases)}; name another split, "
            "or assign cases in the column split"
        )
    return chosen


def count_splits(cases: Iterable[Case]) -> str:
    """Returns the number of rows of each split, e.g. "40 train, 5 tune, 6 validation"."""
    counts = collections.Counter(case.split for case in cases)
    return ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])


def annotator_columns(path: str | Path) -> list[str]:
    """Returns the columns of further annotators' masks. Raises as `read_manifest`."""
    header = _read_rows(Path(path))[0][1]
    return [name for name in header if name.startswith(ANNOTATOR)]


def write_manifest(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes rows (values by column, all required ones among them) as `cases.csv`."""
    rows = list(rows)
    columns = dict.fromkeys((*REQUIRED, *(name for row in rows for name in row)))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def case_hash(data_set: str, case_id: str) -> str:
    """Returns 16 hexadecimal digits that identify a case (patient) of the data set of that name.

    Checkpoints hold these in place of case ids, which may be private. They do not protect ids that
    can be guessed.
    """
    return hashlib.sha256(f"{data_set}|{case_id}".encode()).hexdigest()[:_DIGITS]


def image_hash(image: np.ndarray) -> str:
    """Returns the SHA-256 of a scan's values as read, which outlasts other names and headers."""
    return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


def short_hash(sha256: str) -> str:
    """Returns the part of `image_hash` that checkpoints hold."""
    return sha256[:_DIGITS]


def case_hashes(record: Mapping[str, Any], task: str = "") -> dict[str, list[str]]:
    """Returns the sorted hashes of the cases that a run sees, by split, from a data set's record.

    They are written to `model.json` as `training.cases` and to `run.json` as `data_set.cases`. With
    a task, those of its cases only.
    """
    name = record["name"]
    return _by_split(record, SEEN, task, lambda case: case_hash(name, case["case_id"]))


def training_record(record: Mapping[str, Any], task: str = "") -> dict[str, Any]:
    """Returns what a checkpoint keeps of its data set: `cases`, `images` and `held_out`.

    `images` holds the hashes of the scans by split, and `held_out` those of the patients in
    "validation", which neither trained nor chose the model.
    """
    name, held_out = record["name"], SPLITS[-1:]
    find = functools.partial(_by_split, record)
    return {
        "cases": case_hashes(record, task),
        "images": find(SEEN, task, lambda case: short_hash(case.get("image_sha256", ""))),
        "held_out": find(held_out, "", lambda case: case_hash(name, case["case_id"]))[held_out[0]],
    }


def _by_split(
    record: Mapping[str, Any],
    splits: Sequence[str],
    task: str,
    hash_of: Callable[[Mapping[str, Any]], str],
) -> dict[str, list[str]]:
    hashes: dict[str, set[str]] = {split: set() for split in splits}
    for case in record["cases"]:
        if case["split"] in hashes and task in ("", case["task"]):
            hashes[case["split"]].add(hash_of(case))
    return {split: sorted(found - {""}) for split, found in hashes.items()}


def trained_cases(metadata: Mapping[str, Any], kind: str = "cases") -> dict[str, str]:
    """Returns the split, "train" or "tune", of each case hash that a checkpoint has seen.

    `metadata` is that of `models.checkpoint.read_metadata`; kind "images" gives the hashes of its
    scans. Empty for a checkpoint without such a record, such as a released one.
    """
    cases = metadata.get("training", {}).get(kind, {})
    return {one: split for split in reversed(SEEN) for one in cases.get(split, ())}


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Returns (line, stripped values) of each non-blank row; the header is first and is checked."""
    if not path.is_file():
        raise UserError(f"{path}: no such manifest; give a CSV file with {','.join(REQUIRED)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: is not UTF-8 (line {line}, byte {error.object[error.start]:#04x}); save it "
            "as 'CSV UTF-8'"
        ) from None
    first, _, rest = text.partition("\n")
    named = re.fullmatch(r"sep=(.)\r?", first)  # Excel's own note of the delimiter
    if named:
        text = f"\n{rest}"
    header = re.split(r"[\r\n]", text.lstrip())[0]
    delimiter = named[1] if named else max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for values in reader:
            stripped = [value.strip() for value in values]
            if any(stripped):
                rows.append((reader.line_num, stripped))
    except csv.Error as error:
        raise UserError(
            f"{path}: row {reader.line_num} is no CSV ({error}); check its quotes"
        ) from None
    if len(rows) < 2:
        raise UserError(f"{path}: has no cases; add rows under the header {_COLUMNS}")
    _check_header(path, rows[0][1])
    return rows


def _check_header(path: Path, header: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in header]
    known = (*REQUIRED, *OPTIONAL)
    unknown = [name for name in header if name not in known and not name.startswith(ANNOTATOR)]
    repeated = [name for name, count in collections.Counter(header).items() if count > 1]
    if missing or unknown or repeated:
        raise UserError(
            f"{path}: header {','.join(header)!r}: missing {missing or 'none'}, unknown "
            f"{unknown or 'none'}, repeated {repeated or 'none'}; the columns are {_COLUMNS}"
        )
    for name in (ANNOTATOR, ANNOTATOR + FIRST):
        if name in header:
            raise UserError(f"{path}: column {name!r} names no other annotator; rename it")


def _problem(header: list[str], values: list[str], fields: dict[str, str]) -> str:
    """Returns what is wrong with a row on its own, "" where nothing is."""
    if len(values) != len(header):
        return (
            f"has {len(values)} fields, the header {len(header)}; quote values that contain commas"
        )
    if empty := [name for name in REQUIRED if not fields[name]]:
        return f"{', '.join(empty)} is empty; fill it in"
    if fields.get("split") and fields["split"] not in SPLITS:
        return f"split {fields['split']!r}; use one of {', '.join(SPLITS)}"
    if not all(label.isdecimal() and int(label) for label in fields.get("ignore", "").split()):
        return f"ignore {fields['ignore']!r}; give label numbers above 0 with spaces between"
    try:
        check_name(fields["image"])
        check_name(fields["mask"])
    except UserError as error:
        return str(error)
    return ""


def _case(line: int, fields: dict[str, str], folder: Path) -> Case:
    """Returns the case of a row; its split is the one that the row names, or ""."""
    return Case(
        row=line,
        case_id=fields["case_id"],
        image=str(folder / fields["image"]),
        mask=str(folder / fields["mask"]),
        modality=fields["modality"],
        task=fields["task"],
        split=fields.get("split", ""),
        window=fields.get("window") or None,
        ignore=tuple(map(int, fields.get("ignore", "").split())),
        annotators=tuple(
            (name.removeprefix(ANNOTATOR), str(folder / file))
            for name, file in fields.items()
            if name.startswith(ANNOTATOR) and file
        ),
    )


def _conflicts(cases: list[Case]) -> dict[int, str]:
    """Returns a line for each row that repeats a scan, or puts one patient into a second split."""
    conflicts = {}
    first: dict[str, Case] = {}
    splits: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.key, case)
        if other is not case:
            conflicts[case.row] = (
                f"{case.row_name}: case id, task {case.task} and modality {case.modality} repeat "
                f"row {other.row}; give each scan its own case id or task"
            )
        elif case.split:
            other = splits.setdefault(case.case_id, case)
            if other.split != case.split:
                conflicts[case.row] = (
                    f"{case.row_name}: split {case.split}, but row {other.row} puts the same case "
                    f"into {other.split}; a patient belongs to one split"
                )
    return conflicts
