"""Finds the scans and masks of a folder and pairs them: rows for a manifest, and what is left."""

import collections
import dataclasses
import difflib
import os
import pathlib
import unicodedata

from medsam_jax.data import manifest
from medsam_jax.errors import UserError
from medsam_jax.io.dicom import list_series
from medsam_jax.io.folders import IMAGE_SUFFIXES, search

from .patients import (
    MASK_WORDS,
    Row,
    cleaned,
    doubtful,
    group_patients,
    joined,
    without,
)

SUFFIXES = (*IMAGE_SUFFIXES, ".dcm")


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Rows (case_id, image, mask, modality, task), and one line for each file left over."""

    rows: list[Row]
    problems: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    ignore: str = ""  # of the manifest's column, for all rows


def pair_folders(images: pathlib.Path, masks: pathlib.Path, modality: str, task: str) -> Pairing:
    """Pairs files whose names agree once words such as image, mask, seg or 0000 are taken out.

    Folders are searched through; a folder of DICOM files counts as one scan. `images` and `masks`
    may be the same folder: the words then tell which is which. `group_patients` names patients and
    modalities; `modality` is that of the scans that say none.

    Raises:
      UserError: a folder is missing or holds nothing that can be read.
    """
    image_files, left_out = _files(images)
    mask_files, more = _files(masks)
    if images.resolve() == masks.resolve():
        image_files = [file for file in image_files if not _is_mask(file)]
        mask_files = [file for file in mask_files if _is_mask(file)]
    by_key: dict[str, tuple[list, list]] = collections.defaultdict(lambda: ([], []))
    for side, (root, files) in enumerate(((images, image_files), (masks, mask_files))):
        for file in files:
            by_key[_key(file.relative_to(root))][side].append(file)
    rows, problems = [], []
    left_out = list(dict.fromkeys(left_out + more))
    image_keys = [key for key, (found, _) in by_key.items() if found]
    mask_keys = [key for key, (_, found) in by_key.items() if found]
    for key, (found, found_masks) in sorted(by_key.items()):
        if len(found) == len(found_masks) == 1:
            rows.append((key, str(found[0]), str(found_masks[0]), modality, task))
        elif len(found) > 1 or len(found_masks) > 1:
            names = ", ".join(str(file) for file in found + found_masks)
            problems.append(f"several files share the name {key!r}: {names}; rename or remove some")
        elif found:
            problems.append(f"{found[0]}: no mask named like it{_nearest(key, mask_keys)}")
        else:
            problems.append(f"{found_masks[0]}: no image named like it{_nearest(key, image_keys)}")
    rows, notes, warnings = group_patients(rows, images)
    return Pairing(rows, problems + left_out, notes, warnings)


def read_npz(folder: pathlib.Path, modality: str, task: str) -> Pairing:
    """MedSAM's `.npz` files, each with image and mask (`imgs`, `gts`): a row for each."""
    files, left_out = _files(folder)
    chosen = [file for file in files if file.suffix == ".npz"]
    if not chosen:
        raise UserError(f"{folder}: holds no .npz files; see --images for other formats")
    left_out += [f"{file}: is no .npz file; see --images" for file in files if file not in chosen]
    rows = [(_stem(file), str(file), str(file), modality, task) for file in chosen]
    return Pairing(rows, left_out, warnings=list(doubtful(row[0] for row in rows)))


def write_manifest(path: pathlib.Path, rows: list[Row], ignore: str = "") -> None:
    """Writes `cases.csv`, its paths relative to it where they can be. Never overwrites a file."""
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already; choose another --output")
    base = path.absolute().parent
    columns = []
    for case_id, image, mask, modality, task in rows:
        files = (_relative(name, base) for name in (image, mask))
        columns.append(dict(zip(manifest.REQUIRED, (case_id, *files, modality, task), strict=True)))
    if ignore:
        columns = [row | {"ignore": ignore} for row in columns]
    manifest.write_manifest(path, columns)


def _relative(name: str, base: pathlib.Path) -> str:
    """Returns a path from `base`, as a manifest holds it."""
    return manifest.kept_whole(os.path.relpath(os.path.abspath(name), base))


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Scans under a folder, sorted, and lines of what is left out; DICOM folders as themselves."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; correct the path")
    contents = search(folder)
    found, left_out = set(contents.files), list(contents.left_out)
    for place, files in contents.dicom.items():
        if place != folder:
            found.add(place)
        elif any(len(of_series) > 1 for of_series in list_series(folder).values()):
            left_out.append(
                f"{folder}: {len(files)} DICOM files lie beside each other; give each series a "
                "folder of its own"
            )
        else:  # an image each
            found.update(files)
    if not found:
        raise UserError(
            f"{folder}: holds no file that can be read here ({', '.join(SUFFIXES)}, or DICOM)"
            + "".join(f"; {line}" for line in left_out[:3])
        )
    return sorted(found), left_out


def _stem(file: pathlib.Path) -> str:
    name = file.name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _is_mask(file: pathlib.Path) -> bool:
    stem = _stem(file)
    return without(stem, MASK_WORDS) != stem


def _key(relative: pathlib.PurePath) -> str:
    """Returns the part that image and mask names share: folders and name without those words."""
    parts = [*relative.parts[:-1], _stem(pathlib.Path(relative.name))]
    parts = [unicodedata.normalize("NFC", part) for part in parts]  # macOS writes NFD
    return joined(map(cleaned, parts)) or "_".join(parts)


def _nearest(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r}, here {key!r}); rename one" if close else f" ({key!r})"
