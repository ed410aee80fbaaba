"""The manifest `cases.csv`: its rows, their splits, and everything that may be wrong with it."""

import collections
import csv
import dataclasses
import hashlib
import pathlib

from medsam_jax.errors import UserError

REQUIRED = ("case_id", "image", "mask", "modality", "task")
OPTIONAL = ("split", "window")
ANNOTATOR = (
    "mask_"  # further annotators' masks in columns `mask_NAME`, read by the evaluation alone
)
SPLITS = ("train", "tune", "validation")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a scan, its label map, and what they are."""

    row: int  # line of the manifest, the header is line 1
    case_id: str
    image: str  # absolute path; FOLDER#SERIES_UID chooses one DICOM series of several
    mask: str
    modality: str
    task: str
    split: str
    window: str  # CT window of the recipe, "" for its default

    @property
    def name(self) -> str:
        """How messages name the row."""
        return f"row {self.row} (case {self.case_id})"

    @property
    def key(self) -> str:
        """Unique in a manifest; a patient may have several scans and tasks."""
        return f"{self.case_id}|{self.task}|{self.modality}"


def split_of(dataset: str, case_id: str, seed: int = 0) -> str:
    """80/10/10 by a hash of data set, case id and seed: adding cases moves nobody."""
    digest = hashlib.sha256(f"{seed}|{dataset}|{case_id}".encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if fraction < 0.8 else "tune" if fraction < 0.9 else "validation"


def read_manifest(
    path: str | pathlib.Path, dataset: str, seed: int = 0
) -> tuple[list[Case], list[str]]:
    """Reads a manifest in `cases.csv` form.

    Args:
      path: a UTF-8 CSV file; image and mask paths are relative to it.
      dataset: the name that enters the split hash.
      seed: of the split hash.

    Returns:
      The well-formed cases, and one line for each row that is not.

    Raises:
      UserError: the file itself cannot be used: missing, not UTF-8, or a wrong header.
    """
    path = pathlib.Path(path)
    rows = _read_rows(path)
    header = [name.strip() for name in rows[0][1]]
    _check_header(path, header)
    cases, problems = [], []
    for line, values in rows[1:]:
        if len(values) != len(header):
            problems.append(
                f"{path} row {line}: has {len(values)} fields, the header {len(header)}; "
                "quote values that contain commas"
            )
            continue
        fields = {name: value.strip() for name, value in zip(header, values, strict=True)}
        empty = [name for name in REQUIRED if not fields[name]]
        if empty:
            problems.append(f"{path} row {line}: {', '.join(empty)} is empty; fill it in")
            continue
        given = fields.get("split", "")
        if given and given not in SPLITS:
            problems.append(f"{path} row {line}: split {given!r}; use one of {', '.join(SPLITS)}")
            continue
        cases.append(
            Case(
                row=line,
                case_id=fields["case_id"],
                image=str(path.parent.absolute() / fields["image"]),
                mask=str(path.parent.absolute() / fields["mask"]),
                modality=fields["modality"],
                task=fields["task"],
                split=given,
                window=fields.get("window", ""),
            )
        )
    conflicts = _conflicts(cases)
    problems += [f"{path} {line}" for line in conflicts.values()]
    cases = [case for case in cases if case.row not in conflicts]
    chosen = {case.case_id: case.split for case in cases if case.split}
    return [
        dataclasses.replace(
            case, split=chosen.get(case.case_id) or split_of(dataset, case.case_id, seed)
        )
        for case in cases
    ], problems


def _read_rows(path: pathlib.Path) -> list[tuple[int, list[str]]]:
    """(line, values) of each non-blank row; the header is first."""
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
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    rows = []
    try:
        for values in reader:
            if any(value.strip() for value in values):
                rows.append((reader.line_num, values))
    except csv.Error as error:
        raise UserError(
            f"{path}: row {reader.line_num} is no CSV ({error}); check its quotes"
        ) from None
    if len(rows) < 2:
        raise UserError(f"{path}: has no cases; the header is {','.join(REQUIRED)}[,split,window]")
    return rows


def _check_header(path: pathlib.Path, header: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in header]
    unknown = [
        name
        for name in header
        if name not in REQUIRED + OPTIONAL and not name.startswith(ANNOTATOR)
    ]
    repeated = [name for name, count in collections.Counter(header).items() if count > 1]
    if missing or unknown or repeated:
        raise UserError(
            f"{path}: header {','.join(header)!r}: missing {missing or 'none'}, unknown "
            f"{unknown or 'none'}, repeated {repeated or 'none'}; the columns are "
            f"{','.join(REQUIRED)}[,split,window,{ANNOTATOR}NAME...]"
        )


def annotator_columns(path: str | pathlib.Path) -> list[str]:
    """Columns of a manifest with further annotators' masks. Raises as `read_manifest`."""
    header = _read_rows(pathlib.Path(path))[0][1]
    return [name.strip() for name in header if name.strip().startswith(ANNOTATOR)]


def _conflicts(cases: list[Case]) -> dict[int, str]:
    """Line by row: rows that repeat a scan, or put one patient into a second split."""
    conflicts = {}
    first: dict[str, Case] = {}
    splits: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.key, case)
        if other is not case:
            conflicts[case.row] = (
                f"{case.name}: case id, task {case.task} and modality {case.modality} repeat row "
                f"{other.row}; give each scan its own case id or task"
            )
        elif case.split:
            other = splits.setdefault(case.case_id, case)
            if other.split != case.split:
                conflicts[case.row] = (
                    f"{case.name}: split {case.split}, but row {other.row} puts the same case into "
                    f"{other.split}; a patient belongs to one split"
                )
    return conflicts
