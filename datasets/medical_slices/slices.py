"""Makes the examples of one manifest row, slice by slice, and counts what was dropped."""

import collections
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from medsam_jax.data import objects
from medsam_jax.data.manifest import Case, image_hash
from medsam_jax.data.modality import Limits, doubts
from medsam_jax.data.preprocess import intensity_limits, normalise_intensity, resize_image
from medsam_jax.data.recipes import get_recipe
from medsam_jax.errors import UserError
from medsam_jax.io.geometry import Scan, slice_axis
from medsam_jax.io.notes import notes_of_pair
from medsam_jax.io.scans import read_mask_scan, read_scan

HISTOGRAM_BINS = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices of a build that apply to every case; the data set's record holds them."""

    recipe: str
    axis: int | None = None  # of slicing, in (z, y, x) order; None finds the out-of-plane one
    instances: int | None = None  # the label that is split into its connected parts
    labels: tuple[tuple[str, int, str], ...] = ()  # (task or "", label, name); empty keeps all


@dataclasses.dataclass(frozen=True)
class Checked:
    """Result of the check of a row; `problems` are lines for the user."""

    case: Case
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # on how image and mask were read
    image_sha256: str = ""
    labels: tuple[int, ...] = ()  # original ids in the mask that were asked for
    slices: int = 0  # that will be stored
    drops: tuple[tuple[str, int], ...] = ()  # what will not be, and how many


def parse_labels(text: str) -> tuple[tuple[str, int, str], ...]:
    """Reads `--labels`: comma-separated `[task:]id[=name]`. Raises UserError."""
    chosen = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        task, _, rest = item.rpartition(":")
        number, _, name = rest.partition("=")
        if not number.strip().isdigit() or int(number) == 0:
            raise UserError(f"--labels: {item!r}; write [task:]id[=name], e.g. 1=liver,2=tumour")
        chosen.append((task.strip(), int(number), name.strip()))
    return tuple(chosen)


def wanted_labels(present: tuple[int, ...], task: str, options: Options) -> tuple[int, ...]:
    """The labels of a task that `options` keep, out of those present."""
    if not options.labels:
        return present
    chosen = {label for of_task, label, _ in options.labels if of_task in ("", task)}
    return tuple(label for label in present if label in chosen)


def check_case(case: Case, options: Options) -> Checked:
    """Reads a row's files whole and reports their defects, without raising."""
    try:
        return _checked(case, options)
    except UserError as error:
        return Checked(case, problems=(f"{case.row_name}: {error}",))


def _checked(case: Case, options: Options) -> Checked:
    scan = read_scan(case.image)
    _limits(scan, case, options)
    mask = read_mask_scan(case.mask, scan)
    labels = mask.array
    doubtful = doubts(scan.array, case.modality, get_recipe(options.recipe))
    warnings = [f"{case.row_name}: {doubt}; check {case.image}" for doubt in doubtful]
    found = objects.present_labels(labels).tolist()
    present = tuple(label for label in found if label not in case.ignore)
    kept = wanted_labels(present, case.task, options)
    if len(kept) > 255:
        raise UserError(f"{case.mask}: has {len(kept)} labels, 255 fit; choose with --labels")
    table = {label: rank + 1 for rank, label in enumerate(kept)}  # any numbers will do here
    drops: collections.Counter = collections.Counter()
    stored = 0
    if table:
        stored = sum(1 for _ in _kept_slices(scan, labels, table, options, drops))
    return Checked(
        case,
        warnings=tuple(warnings),
        notes=notes_of_pair(scan, mask),
        image_sha256=image_hash(scan.array),
        labels=kept,
        slices=stored,
        drops=tuple(drops.items()),
    )


def _limits(scan: Scan, case: Case, options: Options) -> Limits | None:
    """Intensity limits of the scan. Raises UserError for an image without contrast."""
    low, high = scan.array.min(), scan.array.max()
    if low == high:
        raise UserError(f"{case.image}: the image is constant ({low:g}); leave this case out")
    recipe = get_recipe(options.recipe)
    try:
        return intensity_limits(scan.array, case.modality, recipe, case.window)
    except UserError as error:
        raise UserError(f"{case.image}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Slice:
    index: int
    stored: UInt8[np.ndarray, "s s"]


def _kept_slices(
    scan: Scan,
    labels: np.ndarray,
    table: dict[int, int],
    options: Options,
    drops: collections.Counter,
) -> Iterator[_Slice]:
    """The slices with a kept object; `drops` counts the rest by reason."""
    recipe = get_recipe(options.recipe)
    labels = np.moveaxis(objects.remap_labels(labels, table), _axis(scan, options), 0)
    instances = table.get(options.instances)
    offset = max(table.values())
    if instances is not None:
        labels = objects.split_instances(labels, instances, offset)
    empty = "slices without a label"
    emptied = "slices whose every object was dropped"
    labels, dropped = objects.keep_in_scan(labels, recipe)
    drops.update(dropped)
    for index, plane in enumerate(labels):
        if not plane.any():
            drops[empty] += 1
            continue
        if instances is not None:
            plane = objects.compact_instances(plane, offset)
        if plane.max() > 255:
            raise UserError(
                f"{scan.path}: slice {index} holds {plane.max()} objects, 255 fit; crop the image"
            )
        stored, dropped = objects.keep_in_slice(plane, recipe)
        drops.update(dropped)
        if stored.any():
            yield _Slice(index, stored)
        else:
            drops[emptied] += 1


def _axis(scan: Scan, options: Options) -> int:
    return slice_axis(scan) if options.axis is None else options.axis


def case_examples(
    case: Case, table: dict[int, int], options: Options
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """Returns the examples of a row in slice order, and its report for the data card.

    Args:
      case: the row.
      table: original label to stored id, of the row's task.
      options: of the build.

    Returns:
      (key, TFDS example) pairs with PNG bytes, and a JSON-able report.
    """
    recipe = get_recipe(options.recipe)
    scan = read_scan(case.image)
    limits = _limits(scan, case, options)
    drops: collections.Counter = collections.Counter()
    axis = _axis(scan, options)
    volume = np.moveaxis(scan.array, axis, 0)
    in_plane = np.delete(np.array(scan.spacing), axis)  # row, column
    original_shape = volume.shape[1:3]
    mask = read_mask_scan(case.mask, scan)
    after = np.zeros(256, np.int64)
    examples, sizes = [], []
    for kept in _kept_slices(scan, mask.array, table, options, drops):
        plane = normalise_intensity(volume[kept.index], case.modality, recipe, case.window, limits)
        image, valid_shape = resize_image(plane, recipe)
        first = np.ascontiguousarray(image[:, :, 0])
        after += np.bincount(first[: valid_shape[0], : valid_shape[1]].ravel(), minlength=256)
        spacing = in_plane * np.array(original_shape) / np.array(valid_shape)
        example = {
            "image": encode_image(first if plane.ndim == 2 else image[:, :, ::-1]),
            "mask": encode_mask(kept.stored),
            "case_id": case.case_id,
            "task": case.task,
            "modality": case.modality,
            "slice_index": kept.index,
            "spacing": spacing.astype(np.float32),
            "original_shape": np.array(original_shape, np.int32),
            "valid_shape": np.array(valid_shape, np.int32),
        }
        examples.append((f"{case.key}|{kept.index:05d}", example))
        pixels = np.bincount(kept.stored.ravel(), minlength=256)
        sizes.append([[int(i), int(pixels[i])] for i in np.flatnonzero(pixels) if i])
    before, edges = np.histogram(scan.array, bins=HISTOGRAM_BINS)
    report = {
        "row": case.row,
        "case_id": case.case_id,
        "task": case.task,
        "modality": case.modality,
        "split": case.split,
        "slices": len(examples),
        "scan_slices": int(volume.shape[0]),
        "slice_axis": "zyx"[axis],
        "scan_shape": list(scan.array.shape),
        "scan_spacing": [None if np.isnan(step) else float(step) for step in scan.spacing],
        "intensity_limits": list(limits[:2]) if limits else None,
        "notes": list(notes_of_pair(scan, mask)),
        "objects": sizes,  # per stored slice: [stored id, pixels]
        "drops": dict(drops),
        "histogram_before": {
            "counts": before.tolist(),
            "edges": [float(edges[0]), float(edges[-1])],
        },
        "histogram_after": after.reshape(HISTOGRAM_BINS, -1).sum(axis=1).tolist(),
    }
    return examples, report


def encode_image(image: UInt8[np.ndarray, "s s *c"]) -> io.BytesIO:
    """Returns PNG bytes of a slice; filter and run lengths suit CT."""
    import cv2

    return _png(image, cv2.IMWRITE_PNG_FILTER_AVG)


def encode_mask(mask: UInt8[np.ndarray, "s s"]) -> io.BytesIO:
    """Returns PNG bytes of a label map, unfiltered: its runs of one value compress well."""
    import cv2

    return _png(mask, cv2.IMWRITE_PNG_FILTER_NONE)


def _png(array: np.ndarray, row_filter: int) -> io.BytesIO:
    """Returns PNG bytes in a file object, which a TFDS Image feature takes without TensorFlow.

    Grey slices are stored with one channel and read back with three. Colours are BGR here.
    """
    import cv2

    settings = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    settings += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    settings += [cv2.IMWRITE_PNG_FILTER, row_filter]
    done, encoded = cv2.imencode(".png", np.ascontiguousarray(array), settings)
    if not done:
        raise RuntimeError(f"OpenCV could not encode a slice of shape {array.shape}")
    return io.BytesIO(encoded.tobytes())
