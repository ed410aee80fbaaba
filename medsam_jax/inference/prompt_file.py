"""Objects that the predict command is to find: prompted by flags, a JSON file or a mask.

The JSON file names images and lists prompts for each:

    {"photo.png": [{"box": [20, 30, 180, 160], "name": "lesion"},
                   {"points": [[40, 50, 1], [60, 70, 0]]}],
     "ct.nii.gz": [{"label": 5, "name": "liver", "slice": 40, "box": [160, 120, 260, 210]},
                   {"label": 5, "slice": 52, "box": [150, 118, 262, 215]}]}

An image's own modality and CT window, which take precedence over those of the command line:

    {"ct.nii.gz": {"modality": "CT", "window": "lung", "prompts": [{"box": [10, 10, 60, 50]}]}}

Keys are file names without folders (of a DICOM series, its folder's). A prompt has a `box`
[x0, y0, x1, y1], `points` [x, y, 1 or 0], or both; `slice` counts from 0; `label` is its number in
the mask, by default its place in the list. Prompts of one label on several slices are one object.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.data.modality import is_ct
from medsam_jax.data.prompts import box_from_mask
from medsam_jax.errors import UserError
from medsam_jax.inference.request import check_modality
from medsam_jax.io.geometry import Scan
from medsam_jax.io.notes import log_notes
from medsam_jax.io.scans import read_mask_scan

_FIELDS = ("label", "name", "slice", "box", "points")
_IMAGE_FIELDS = ("modality", "window", "prompts")
_LARGEST_LABEL = 65535  # what a mask of 16 bits holds


@dataclasses.dataclass
class ObjectPrompts:
    """An object to find: its number in the mask, its name, and its prompts by slice."""

    label: int
    name: str | None = None
    # Slice -> box and points as given; the key None is the slice that the command line names.
    slices: dict[int | None, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class ImagePrompts:
    """The objects of an image, and how it is to be read where the file says it."""

    objects: list[ObjectPrompts]
    modality: str | None = None
    window: str | None = None


def arguments(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt's box and points as arguments of `Predictor.predict`."""
    given: dict[str, Any] = {}
    if "box" in prompt:
        given["box"] = prompt["box"]
    if "points" in prompt:
        points = np.array(prompt["points"], float)
        given |= {"point_coords": points[:, :2], "point_labels": points[:, 2]}
    return given


def from_flags(boxes: list[list[float]], points: list[list[float]]) -> list[ObjectPrompts]:
    """Every box is an object; points refine the only box, or are one object.

    Raises UserError for points with several boxes.
    """
    if len(boxes) > 1 and points:
        raise UserError(
            f"--point: points go with one --box, not with {len(boxes)}; give --prompts, a JSON file"
        )
    prompts: list[dict[str, Any]] = [{"box": box} for box in boxes] or [{}]
    if points:
        prompts[0]["points"] = points
    return [ObjectPrompts(label, None, {None: p}) for label, p in enumerate(prompts, start=1)]


def from_json(path: str | Path) -> dict[str, ImagePrompts]:
    """Returns the prompts of each image that a JSON file names; the module says what it holds.

    Raises UserError for no such file, no JSON, or a prompt that does not follow the schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({error}); correct it there") from None
    is_table = isinstance(content, dict)
    if not is_table or not all(isinstance(v, list | dict) for v in content.values()):
        raise UserError(f"{path}: give an object of image names, each with a list of prompts")
    return {image: _image(f"{path}: {image}", fields) for image, fields in content.items()}


def _image(where: str, fields: list[Any] | dict[str, Any]) -> ImagePrompts:
    if isinstance(fields, list):
        return ImagePrompts(_objects(where, fields))
    unknown = sorted(set(fields) - set(_IMAGE_FIELDS))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; use {', '.join(_IMAGE_FIELDS)}")
    if not isinstance(fields.get("prompts"), list):
        raise UserError(f"{where}: has no list of prompts; add prompts: [...]")
    for name in ("modality", "window"):
        if not isinstance(fields.get(name), str | None):
            raise UserError(f"{where}: {name} {fields[name]!r}; give a text in quotes")
    modality, window = fields.get("modality"), fields.get("window")
    check_modality(f"{where}: modality", modality)
    if window and modality and not is_ct(modality):
        raise UserError(
            f"{where}: window {window!r} is for CT, the modality is {modality}; leave it out"
        )
    return ImagePrompts(_objects(where, fields["prompts"]), modality, window)


def _objects(where: str, prompts: list[Any]) -> list[ObjectPrompts]:
    if not prompts:
        raise UserError(f"{where}: its list of prompts is empty; add one, or leave the image out")
    objects: dict[int, ObjectPrompts] = {}
    for place, prompt in enumerate(prompts, start=1):
        here = f"{where}, prompt {place}"
        _check(here, prompt)
        label = prompt.get("label", place)
        found = objects.setdefault(label, ObjectPrompts(label))
        found.name = prompt.get("name", found.name)
        index = prompt.get("slice")
        if index in found.slices:
            at = "" if index is None else f" on slice {index}"
            raise UserError(f"{here}: label {label} has a prompt{at} already; use another label")
        found.slices[index] = {key: prompt[key] for key in ("box", "points") if key in prompt}
    return list(objects.values())


def _check(here: str, prompt: Any) -> None:
    if not isinstance(prompt, dict):
        raise UserError(f"{here}: {prompt!r}; give an object with box or points")
    unknown = sorted(set(prompt) - set(_FIELDS))
    if unknown:
        raise UserError(f"{here}: unknown field {unknown[0]!r}; use {', '.join(_FIELDS)}")
    if "box" not in prompt and "points" not in prompt:
        raise UserError(f"{here}: has neither box nor points; give one of them")
    for key, least, most in (("label", 1, _LARGEST_LABEL), ("slice", 0, _LARGEST_LABEL)):
        value = prompt.get(key, least)
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{here}: {key} {value!r}; give a whole number from {least} to {most}")
    if not isinstance(prompt.get("name", ""), str):
        raise UserError(f"{here}: name {prompt['name']!r}; give a text in quotes")
    if "box" in prompt and not _are_numbers(prompt["box"], 4):
        raise UserError(f"{here}: box {prompt['box']!r}; give [x0, y0, x1, y1]")
    points = prompt.get("points", [[0, 0, 1]])
    if not isinstance(points, list) or not points or not all(_are_numbers(p, 3) for p in points):
        raise UserError(f"{here}: points {points!r}; give [[x, y, label], ...], label 1 or 0")


def _are_numbers(value: Any, count: int) -> bool:
    are_numbers = isinstance(value, list) and all(type(x) in (int, float) for x in value)
    return are_numbers and len(value) == count


def label_names(items: Sequence[str]) -> dict[int, str]:
    """Reads `--labels`, `ID=NAME` each. Raises UserError."""
    pairs = [item.partition("=") for item in items]
    names = {int(number): name.strip() for number, _, name in pairs if number.strip().isdecimal()}
    if len(names) < len(pairs) or not all(names.values()):
        raise UserError(f"--labels: {','.join(items)}; give ID=NAME, e.g. 1=liver,2=tumour")
    return names


def from_mask(
    path: str | Path, scan: Scan, axis: int, names: Mapping[int, str] | None = None
) -> list[ObjectPrompts]:
    """Every label of a mask is an object, prompted by its box on each slice that it is in.

    Its name is that of `names`, or else that of the file, which a DICOM SEG holds.

    Raises UserError as `read_mask`, and for labels above 65535.
    """
    mask = read_mask_scan(path, scan)
    log_notes(mask)
    labels = np.moveaxis(mask.array, axis, 0)
    if labels.max() > _LARGEST_LABEL:
        raise UserError(f"{path}: label {labels.max()}; renumber the labels, 1 to {_LARGEST_LABEL}")
    known = {**mask.label_names, **(names or {})}
    objects: dict[int, ObjectPrompts] = {}
    for index, plane in enumerate(labels):
        for label in np.unique(plane[plane > 0]).tolist():
            found = objects.setdefault(label, ObjectPrompts(label, known.get(label)))
            found.slices[index] = {"box": box_from_mask(plane == label).tolist()}
    return [objects[label] for label in sorted(objects)]
