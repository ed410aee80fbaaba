"""Finds the scans and masks of a folder and pairs them: rows for a manifest, and what is left."""

import collections
import dataclasses
import difflib
import json
import os
import pathlib
import re

from medsam_jax.data import manifest
from medsam_jax.errors import UserError
from medsam_jax.io import pictures

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".dcm", ".npz", *pictures.SUFFIXES)
MASK_WORDS = "mask|masks|seg|segs|segmentation|label|labels|gt|truth|groundtruth|annotation|roi"
IMAGE_WORDS = "image|images|img|imgs|scan|volume|vol|orig|0000"
Row = tuple[str, str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Rows (case_id, image, mask, modality, task), and one line for each file left over."""

    rows: list[Row]
    problems: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)


def pair_folders(images: pathlib.Path, masks: pathlib.Path, modality: str, task: str) -> Pairing:
    """Pairs files whose names agree once words such as image, mask, seg or 0000 are taken out.

    Folders are searched through; a folder of DICOM files counts as one scan. `images` and `masks`
    may be the same folder: the words then tell which is which.

    Raises:
      UserError: a folder is missing or holds nothing that can be read.
    """
    image_files = _files(images)
    mask_files = _files(masks)
    if images.resolve() == masks.resolve():
        image_files = [file for file in image_files if not _is_mask(file)]
        mask_files = [file for file in mask_files if _is_mask(file)]
    by_key: dict[str, tuple[list, list]] = collections.defaultdict(lambda: ([], []))
    for side, (root, files) in enumerate(((images, image_files), (masks, mask_files))):
        for file in files:
            by_key[_key(file.relative_to(root))][side].append(file)
    rows, problems = [], []
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
    return Pairing(rows, problems)


def read_nnunet(folder: pathlib.Path, task: str) -> Pairing:
    """Reads a nnU-Net raw folder: `dataset.json`, `imagesTr` and `labelsTr`, versions 1 and 2.

    Every channel becomes a row with its name as the modality; the label names are noted.

    Raises:
      UserError: no or unusable `dataset.json`.
    """
    path = folder / "dataset.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        channels = described.get("channel_names") or described["modality"]
        labels = described["labels"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: does not exist; give the folder of one nnU-Net data set"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path}: is no nnU-Net dataset.json ({error!r}); check it") from None
    ending = described.get("file_ending", ".nii.gz")
    rows, problems = [], []
    masks = sorted((folder / "labelsTr").glob(f"*{ending}"))
    for mask in masks:
        case_id = mask.name.removesuffix(ending)
        for index, channel in sorted(channels.items()):
            image = folder / "imagesTr" / f"{case_id}_{int(index):04d}{ending}"
            if image.exists():
                rows.append((case_id, str(image), str(mask), channel, task or folder.name))
            else:
                problems.append(f"{image}: does not exist, but {mask.name} is there")
    known = {mask.name.removesuffix(ending) for mask in masks}
    for image in sorted((folder / "imagesTr").glob(f"*{ending}")):
        if image.name.removesuffix(ending)[:-5] not in known:
            problems.append(f"{image}: no mask in labelsTr")
    return Pairing(rows, problems, [f"labels: --labels={_label_flag(labels)}"])


def _label_flag(labels: dict[str, object]) -> str:
    """`--labels` of a nnU-Net label table: {"1": "liver"} (version 1) or {"liver": 1} (2)."""
    pairs = [(int(k), v) if str(k).isdigit() else (v, k) for k, v in labels.items()]
    whole = [(number, name) for number, name in pairs if isinstance(number, int) and number > 0]
    return ",".join(f"{number}={name}" for number, name in sorted(whole))


def read_npz(folder: pathlib.Path, modality: str, task: str) -> Pairing:
    """MedSAM's `.npz` files, each with image and mask (`imgs`, `gts`): a row for each."""
    files = [file for file in _files(folder) if file.suffix == ".npz"]
    if not files:
        raise UserError(f"{folder}: holds no .npz files; see --images for other formats")
    return Pairing([(_stem(file), str(file), str(file), modality, task) for file in files], [])


def write_manifest(path: pathlib.Path, rows: list[Row]) -> None:
    """Writes `cases.csv`, its paths relative to it where they can be. Never overwrites a file."""
    if path.exists():
        raise UserError(f"{path}: is there already; choose another --output")
    base = path.absolute().parent
    columns = []
    for case_id, image, mask, modality, task in rows:
        files = (os.path.relpath(os.path.abspath(name), base) for name in (image, mask))
        columns.append(dict(zip(manifest.REQUIRED, (case_id, *files, modality, task), strict=True)))
    manifest.write_manifest(path, columns)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Scans under a folder, sorted; folders of DICOM files as themselves."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; correct the path")
    found = set()
    for file in folder.rglob("*"):
        if not file.is_file() or file.name.startswith("."):
            continue
        name = file.name.lower()
        if name.endswith(".dcm") or (not file.suffix and _is_dicom(file)):
            found.add(file.parent if file.parent != folder else file)
        elif name.endswith(SUFFIXES):
            found.add(file)
    if not found:
        raise UserError(
            f"{folder}: holds no file that can be read here ({', '.join(SUFFIXES)}, or DICOM)"
        )
    return sorted(found)


def _is_dicom(file: pathlib.Path) -> bool:
    with open(file, "rb") as content:
        return content.read(132)[128:] == b"DICM"


def _stem(file: pathlib.Path) -> str:
    name = file.name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _words(text: str, words: str) -> str:
    """`text` without the given words where they stand between separators."""
    return re.sub(rf"(?i)(?<![a-z0-9])({words})(?![a-z0-9])", "", text)


def _is_mask(file: pathlib.Path) -> bool:
    stem = _stem(file)
    return _words(stem, MASK_WORDS) != stem


def _key(relative: pathlib.PurePath) -> str:
    """Returns the part that image and mask names share: folders and name without those words."""
    parts = [*relative.parts[:-1], _stem(pathlib.Path(relative.name))]
    cleaned = [_words(_words(part, MASK_WORDS), IMAGE_WORDS) for part in parts]
    stripped = [re.sub(r"[_\-. ]+", "_", part).strip("_") for part in cleaned]
    return "_".join(part for part in stripped if part) or "_".join(parts)


def _nearest(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r}, here {key!r}); rename one" if close else f" ({key!r})"
