"""Finds the scans of one patient among paired files, and what each scan's modality is.

A patient is a folder that holds pairs, and of DICOM files the PatientID. Other names are not
enough to tell: scans that may be of one patient are listed for the user to decide.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator

from medsam_jax.errors import UserError
from medsam_jax.io.dicom import is_dicom
from medsam_jax.io.dicom_headers import read_header

MASK_WORDS = "mask|masks|seg|segs|segmentation|label|labels|gt|truth|groundtruth|annotation|roi"
IMAGE_WORDS = "image|images|img|imgs|scan|volume|vol|orig|0000"
Row = tuple[str, str, str, str, str]  # case_id, image, mask, modality, task
# Words of names, and what they say. The first ones mean one thing, a "t1" may be a time point.
_KINDS = {"ct": "CT", "mr": "MR", "mri": "MR", "pet": "PET", "us": "US", "ultrasound": "US"}
_SEQUENCES = {"t1": "MR T1", "t1c": "MR T1c", "t1ce": "MR T1c", "t1gd": "MR T1c", "t2": "MR T2"}
_SEQUENCES |= {"flair": "MR FLAIR", "dwi": "MR DWI", "adc": "MR ADC"}
_MODALITIES = "|".join([*_KINDS, *_SEQUENCES])
_VISITS = r"pre|post|baseline|followup|left|right"
_UNKNOWN = ("", "OT", "SC", "SEG")  # DICOM's modalities that name none
_MANY = 3  # scans whose one PatientID is a placeholder if all of several folders have it


@dataclasses.dataclass(frozen=True)
class _Scan:
    row: Row
    folder: str  # the first folder below the root that says more than a modality, "" without one
    rest: str  # the name without that folder and without modalities
    patient: str  # PatientID of DICOM, or ""
    stated: str  # Modality of DICOM, or ""

    @property
    def hint(self) -> str:
        """Modality that the name says, such as "MR T1", or ""."""
        found = re.findall(rf"(?i)(?<![a-z0-9])({_MODALITIES})(?![a-z0-9])", self.row[0])
        return (_KINDS | _SEQUENCES)[found[-1].lower()] if found else ""


def without(text: str, words: str) -> str:
    """Returns `text` without the given words where they stand between separators."""
    return re.sub(rf"(?i)(?<![a-z0-9])({words})(?![a-z0-9])", "", text)


def cleaned(text: str) -> str:
    """Returns a name without the words that tell images from masks."""
    return without(without(text, MASK_WORDS), IMAGE_WORDS)


def joined(parts: Iterable[str]) -> str:
    """Returns the parts that are not empty, separators of all kinds as one underscore."""
    stripped = (re.sub(r"[_\-. ]+", "_", part).strip("_") for part in parts)
    return "_".join(part for part in stripped if part)


def group_patients(rows: list[Row], root: pathlib.Path) -> tuple[list[Row], list[str], list[str]]:
    """Names the patient and the modality of each row.

    Args:
      rows: case ids are the names that image and mask share; modality as given, or "".
      root: the folder of the images.

    Returns:
      The rows, notes on what decided, and warnings of scans that may be of one patient.
    """
    scans = [_look(row, root) for row in rows]
    warnings: list[str] = []
    patients = _patients(scans, warnings)
    modalities, notes = _modalities(scans, patients)
    grouped, seen = [], collections.Counter()
    for scan, patient, modality in zip(scans, patients, modalities, strict=True):
        _, image, mask, _, task = scan.row
        seen[patient, modality] += 1
        if (number := seen[patient, modality]) > 1:
            notes.append(
                f"{image}: patient {patient} has {modality} already; this scan is task {task} "
                f"{number}"
            )
            task = f"{task} {number}"
        grouped.append((patient, image, mask, modality, task))
    count = len(set(patients))
    if count < len(rows):
        notes.insert(0, f"{len(rows)} scans of {count} patients: a patient's share a split")
    return grouped, notes, warnings + list(doubtful(patients))


def _look(row: Row, root: pathlib.Path) -> _Scan:
    folders = [joined([cleaned(f)]) for f in pathlib.Path(row[1]).relative_to(root).parts[:-1]]
    folder = next((name for name in folders if joined([without(name, _MODALITIES)])), "")
    inner = row[0].replace(folder, "", 1)
    patient, stated = _dicom_names(pathlib.Path(row[1]))
    return _Scan(row, folder, joined([without(inner, _MODALITIES)]), patient, stated)


def _dicom_names(path: pathlib.Path) -> tuple[str, str]:
    """Returns PatientID and Modality of a DICOM file, or of the first of a folder; "" if none."""
    if not is_dicom(str(path)):
        return "", ""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            header = read_header(file)
        except (UserError, OSError):
            continue
        patient, modality = (str(header.get(n, "")).strip() for n in ("PatientID", "Modality"))
        if patient or modality:
            return patient, "" if modality in _UNKNOWN else modality
    return "", ""


def _patients(scans: list[_Scan], warnings: list[str]) -> list[str]:
    """Returns the patient of each scan: its PatientID, its folder, or else its own name."""
    by_folder: dict[str, list[_Scan]] = collections.defaultdict(list)
    for scan in scans:
        by_folder[scan.folder].append(scan)
    by_folder.pop("", None)
    folders = set(by_folder) if _are_patients(by_folder) else set()
    known = {scan.patient for scan in scans}
    placeholder = len(scans) >= _MANY and len(known) == 1 and len(by_folder) != 1 and known != {""}
    if placeholder:
        warnings.append(
            f"all {len(scans)} scans have the PatientID {scans[0].patient!r}, which is taken for a "
            "placeholder; names decide"
        )
    patients = []
    for scan in scans:
        own = "" if placeholder else scan.patient
        if scan.folder in folders:
            members = by_folder[scan.folder]
            ids = {member.patient for member in members} - {""} if not placeholder else set()
            if len(ids) == 1:
                own = ids.pop()
            elif len(members) > 1:
                own = own or scan.folder
            own = own or joined([without(scan.row[0], _MODALITIES)])
        patients.append(own or scan.row[0])
    for folder in sorted(folders):
        ids = sorted({scan.patient for scan in by_folder[folder]} - {""})
        if len(ids) > 1 and not placeholder:
            warnings.append(f"{folder}: holds scans of several PatientIDs, {', '.join(ids)}")
    return patients


def _are_patients(by_folder: dict[str, list[_Scan]]) -> bool:
    """Returns whether folders are patients, by the names of the scans in them.

    In a patient's folder a name says what the scan is (ct, t1, scan_2), so names recur in other
    folders and are fewer than folders. In a folder of many patients a name says whose scan it is.
    """
    several = [folder for folder in by_folder.values() if len(folder) > 1]
    names = collections.Counter(s.rest for folder in several for s in folder if s.rest)
    recur = all(2 * count >= len(several) > 1 for count in names.values())
    return recur and len(names) <= len(by_folder)


def _modalities(scans: list[_Scan], patients: list[str]) -> tuple[list[str], list[str]]:
    """Returns the modality of each scan, and notes on those that are not the given one."""
    found, notes = [], collections.Counter()
    for scan in scans:
        given = scan.row[3]
        hint = "" if _is_sequence(scan.hint) and _kind(given) not in ("", "MR") else scan.hint
        modality, source = given, ""
        if scan.stated and scan.stated != _kind(given):
            modality, source = scan.stated, "DICOM's tag"
        elif not scan.stated and hint and _kind(hint) != _kind(given):
            modality, source = hint if not given else _kind(hint), "the file's name"
        if source:
            notes[f"{modality}, by {source}" + (f" (not {given})" if given else "")] += 1
        found.append(modality)
    counts = collections.Counter(zip(patients, found, strict=True))
    if max(counts.values(), default=1) > 1:  # sequences of MR tell a patient's scans apart
        for index, scan in enumerate(scans):
            if _is_sequence(scan.hint) and found[index] == "MR":
                found[index] = scan.hint
                notes[f"{scan.hint}, by the file's name"] += 1
    return found, [f"modality of {count} scans: {what}" for what, count in notes.items()]


def _is_sequence(hint: str) -> bool:
    return hint in _SEQUENCES.values()


def _kind(modality: str) -> str:
    return modality.split()[0].upper() if modality else ""


def doubtful(patients: Iterable[str]) -> Iterator[str]:
    """Yields a line for each group of case ids that differ by a modality, a visit or a number."""
    names = sorted(set(patients))
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        base = joined([without(without(name, _MODALITIES), _VISITS)])
        groups[re.sub(r"_\d{1,2}$", "", base)].append(name)
    for base, members in groups.items():
        numbered = len({joined([without(m, f"{_MODALITIES}|{_VISITS}")]) for m in members}) > 1
        if len(members) > 1 and base and not (numbered and len(groups) == 1):
            yield (
                f"these may be one patient: {', '.join(members[:6])}"
                + (f" and {len(members) - 6} more" if len(members) > 6 else "")
                + "; if so, give them one case_id, or they may come into different splits"
            )
