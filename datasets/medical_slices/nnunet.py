"""Reads data sets of nnU-Net (versions 1 and 2) and of the Medical Segmentation Decathlon."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from medsam_jax.errors import UserError
from medsam_jax.io.pictures import SUFFIXES as PICTURE_SUFFIXES

from .pairing import Pairing
from .patients import doubtful

_IGNORE = "ignore"  # nnU-Net's name for voxels that nobody annotated


@dataclasses.dataclass(frozen=True)
class _Case:
    name: str
    images: dict[int, pathlib.Path]  # by channel
    mask: pathlib.Path


@dataclasses.dataclass(frozen=True)
class _Described:
    """The content of a `dataset.json`."""

    folder: pathlib.Path
    channels: dict[int, str]
    labels: dict[str, tuple[int, ...]]  # several values for a region
    ending: str
    content: dict[str, Any]


def read_nnunet(folder: pathlib.Path, task: str, modality: str = "") -> Pairing:
    """Reads a folder with `dataset.json`: files of `imagesTr` and `labelsTr`, or those it lists.

    Every channel becomes a row with its name as the modality; the label names are noted. Listed
    are the cases of the Decathlon (`training`) and of nnU-Net's key `dataset`. The label "ignore"
    goes into the manifest's column of that name.

    Args:
      modality: instead of the name of the only channel; "" keeps that.

    Raises:
      UserError: no or unusable `dataset.json`, channels within one file, or a modality for several.
    """
    described = _describe(folder)
    if modality and len(described.channels) > 1:
        names = ", ".join(described.channels.values())
        raise UserError(f"--modality: {modality!r} for several channels ({names}); leave it out")
    cases, problems = _cases(described)
    rows = []
    for case in cases:
        absent = [file for file in (*case.images.values(), case.mask) if not file.exists()]
        problems += [f"{file}: does not exist, but {case.mask.name} is there" for file in absent]
        rows += [
            (case.name, str(file), str(case.mask), modality or described.channels[index], task)
            for index, file in sorted(case.images.items())
            if file not in absent and case.mask not in absent
        ]
    rows = [(*row[:4], task or folder.absolute().name) for row in rows]
    problems += _left_over(described, {file for case in cases for file in case.images.values()})
    ignored = described.labels.pop(_IGNORE, ())
    return Pairing(
        rows,
        problems,
        [f"labels: --labels={_label_flag(described.labels)}"],
        _warnings(described.labels, ignored) + list(doubtful(row[0] for row in rows)),
        " ".join(map(str, ignored)),
    )


def _describe(folder: pathlib.Path) -> _Described:
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        channels = _numbered(content.get("channel_names") or content["modality"])
        ending = content.get("file_ending", ".nii.gz")
        if ending in PICTURE_SUFFIXES and not any(folder.glob(f"imagesTr/*_0001{ending}")):
            channels = {0: "".join(channels.values())}  # R, G and B of one picture
        return _Described(folder, channels, _label_table(content["labels"]), ending, content)
    except FileNotFoundError:
        raise UserError(
            f"{path}: does not exist; give the folder of one nnU-Net data set"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no nnU-Net dataset.json ({error!r}); check it") from None


def _numbered(channels: Any) -> dict[int, str]:
    """Returns channel names by number, from {"0": "CT"}, ["CT"] or "CT"."""
    if isinstance(channels, str):
        return {0: channels}
    pairs = channels.items() if isinstance(channels, Mapping) else enumerate(channels)
    return {int(index): str(name) for index, name in pairs}


def _label_table(labels: Any) -> dict[str, tuple[int, ...]]:
    """Returns values by name, from {"1": "liver"}, {"liver": 1} or {"whole": [1, 2]}."""
    pairs = labels.items() if isinstance(labels, Mapping) else enumerate(labels)
    table = {}
    for key, value in pairs:
        if isinstance(value, str) and not value.isdigit():
            key, value = value, key
        values = value if isinstance(value, list | tuple) else [value]
        table[str(key)] = tuple(int(one) for one in values)
    return table


def _label_flag(labels: Mapping[str, tuple[int, ...]]) -> str:
    """Returns `--labels` for the names of single values."""
    whole = sorted((values[0], name) for name, values in labels.items() if len(values) == 1)
    return ",".join(f"{value}={name}" for value, name in whole if value > 0)


def _warnings(labels: Mapping[str, tuple[int, ...]], ignored: tuple[int, ...]) -> list[str]:
    """Returns lines about values that `--labels` does not name."""
    lines = [
        f'label {value} is nnU-Net\'s "ignore": the column ignore leaves it out'
        for value in ignored
    ]
    single = {values[0] for values in labels.values() if len(values) == 1}
    for name, values in labels.items():
        unnamed = sorted(set(values) - single - {0})
        if len(values) > 1 and unnamed:
            lines.append(
                f"region {name!r} has the labels {', '.join(map(str, unnamed))}, which have no "
                "name: the flag --labels below would leave them out; name them in it"
            )
    return lines


def _cases(described: _Described) -> tuple[list[_Case], list[str]]:
    """Returns the cases, and a line for each listed one that cannot be read."""
    path = described.folder / "dataset.json"
    listed = described.content.get("dataset") or described.content.get("training")
    try:
        if isinstance(listed, Mapping):
            return list(_named(described, listed)), []
        cases = list(_decathlon(described, listed or []))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its list of cases is damaged ({error!r}); check it") from None
    if not any(file.exists() for case in cases for file in case.images.values()):
        return list(_numbered_files(described)), []  # nnU-Net 1 lists names without the channel
    if len(described.channels) > 1:
        names = ", ".join(described.channels.values())
        raise UserError(
            f"{path}: has {len(described.channels)} channels ({names}) in one 4D file a case; save "
            "each channel as a file of its own and pair them with --images and --masks"
        )
    return cases, []


def _named(described: _Described, listed: Mapping[str, Any]) -> Iterator[_Case]:
    """Yields the cases of nnU-Net's key `dataset`; its paths are relative to the folder."""
    for name, case in listed.items():
        files = (described.folder / file for file in case["images"])
        images = dict(zip(described.channels, files, strict=False))
        yield _Case(name, images, described.folder / case["label"])


def _decathlon(described: _Described, listed: list[Any]) -> Iterator[_Case]:
    for case in listed:
        image, mask = described.folder / case["image"], described.folder / case["label"]
        yield _Case(image.name.removesuffix(described.ending), {0: image}, mask)


def _numbered_files(described: _Described) -> Iterator[_Case]:
    folder, ending = described.folder / "imagesTr", described.ending
    for mask in sorted(_visible(described.folder / "labelsTr", ending)):
        name = mask.name.removesuffix(ending)
        images = {index: folder / f"{name}_{index:04d}{ending}" for index in described.channels}
        yield _Case(name, images, mask)


def _left_over(described: _Described, used: set[pathlib.Path]) -> list[str]:
    """Returns a line for each training image without a case, and one for the test images."""
    taken = {file.absolute() for file in used}
    lines = [
        f"{file}: no mask in labelsTr"
        for file in sorted(_visible(described.folder / "imagesTr", described.ending))
        if file.absolute() not in taken
    ]
    tests = _visible(described.folder / "imagesTs", described.ending)
    if tests:
        lines.append(f"{described.folder / 'imagesTs'}: {len(tests)} test images have no masks")
    return lines


def _visible(folder: pathlib.Path, ending: str) -> list[pathlib.Path]:
    return [file for file in folder.glob("[!.]*") if file.name.endswith(ending)]
