"""Scans to evaluate, from a manifest in `cases.csv` form, with one or more reference masks each."""

import csv
import dataclasses
from pathlib import Path

from medsam_jax.errors import UserError

REQUIRED = ("case_id", "image", "mask", "modality", "task")
OPTIONAL = ("split", "window")
ANNOTATOR = "mask_"  # a column of this and a name holds another annotator's masks
FIRST = "mask"  # what the first annotator is called


@dataclasses.dataclass(frozen=True)
class Case:
    """A scan with its reference masks, by annotator; the first one makes the prompts."""

    case_id: str
    image: str
    masks: dict[str, str]
    modality: str
    task: str
    window: str | None  # CT window, None for the checkpoint's

    @property
    def name(self) -> str:
        """How messages name the case."""
        return f"case {self.case_id} ({self.task}, {self.modality})"


def read_cases(path: str | Path, split: str | None = None) -> list[Case]:
    """Reads a manifest; paths are relative to it.

    Args:
      split: only rows of this split; None takes all.

    Raises:
      UserError: no such file, a wrong header, a row with an empty field or missing file, a scan
        that is listed twice, or no row of that split. All rows are checked.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            header = reader.fieldnames or []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); give a CSV file in UTF-8") from None
    annotators = {FIRST: FIRST} | {
        name: name.removeprefix(ANNOTATOR) for name in header if name.startswith(ANNOTATOR)
    }
    for column, name in annotators.items():
        if column != FIRST and name in ("", FIRST):
            raise UserError(f"{path}: column {column!r} names no other annotator; rename it")
    unknown = [name for name in header if name not in (*REQUIRED, *OPTIONAL, *annotators)]
    missing = [name for name in REQUIRED if name not in header]
    if missing or unknown:
        raise UserError(
            f"{path}: header is missing {missing or 'nothing'}, unknown are {unknown or 'none'}; "
            f"the columns are {','.join(REQUIRED)}[,split,window,{ANNOTATOR}NAME...]"
        )
    if split and "split" not in header:
        raise UserError(f"{path}: has no split column; add one, or leave --split out")
    chosen = [row for row in rows if not split or row["split"] == split]
    if not chosen:
        raise UserError(f"{path}: no row{f' of split {split}' if split else ''}; add cases")
    cases, problems, seen = [], [], set()
    for line, row in enumerate(rows, 2):
        if split and row["split"] != split:
            continue
        empty = [name for name in REQUIRED if not (row[name] or "").strip()]
        if empty:
            problems.append(f"{path} row {line}: {', '.join(empty)} is empty")
            continue
        masks = {
            annotator: str(path.parent / row[column])
            for column, annotator in annotators.items()
            if (row[column] or "").strip()
        }
        case = Case(
            row["case_id"],
            str(path.parent / row["image"]),
            masks,
            row["modality"],
            row["task"],
            row.get("window") or None,
        )
        for file in (case.image, *masks.values()):
            if not Path(file.split("#")[0]).exists():
                problems.append(f"{path} row {line}: {file} does not exist")
        if case.name in seen:
            problems.append(f"{path} row {line}: {case.name} is listed twice")
        seen.add(case.name)
        cases.append(case)
    if problems:
        raise UserError("; ".join(problems) + "; correct these rows")
    return cases
