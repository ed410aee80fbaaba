"""From an image file and prompts to files: masks on the input's grid, an overlay, scores."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.data.pictures import SUFFIXES as PICTURE_SUFFIXES
from medsam_jax.data.scans import Scan, read_scan, slice_axis
from medsam_jax.errors import UserError
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator, label_map
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.volume import VolumePredictor
from medsam_jax.models.checkpoint import load_model
from medsam_jax.models.sam import Sam

_KEPT_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")


@dataclasses.dataclass(frozen=True)
class Request:
    """What `python -m medsam_jax.predict` is asked for."""

    checkpoint: str
    image: str
    output: Path
    boxes: list[list[float]]
    points: list[list[float]]  # x, y, label
    auto: bool = False
    modality: str | None = None
    window: str | None = None
    slice_index: int | None = None
    propagate: bool = True


@dataclasses.dataclass
class Segmentation:
    """Labels of slices along the first axis, and what to say of each object."""

    labels: np.ndarray  # int32 [Z, H, W]
    objects: list[dict[str, Any]]


def predict_file(request: Request) -> None:
    """Reads, predicts and writes; prints one line for each file and each object not found.

    Raises:
      UserError: prompts and `auto` that do not go together, a volume without `slice_index`, and
        what reading, prompting and writing raise; nothing is left half-written.
    """
    _check(request)
    scan = read_scan(request.image)
    axis = slice_axis(scan)
    slices = np.moveaxis(scan.array, axis, 0)
    start = _start_slice(request, len(slices))
    model = load_model(request.checkpoint)
    if not isinstance(model, Sam):
        raise UserError(f"{request.checkpoint}: takes no prompts; use a SAM or MedSAM checkpoint")
    predictor = Predictor(model)
    volume = VolumePredictor(predictor)
    volume.set_volume(slices, request.modality, request.window)
    if request.auto:
        found = _find_all(predictor, volume, start)
    else:
        found = _follow_prompts(volume, request, start)
    labels = np.moveaxis(found.labels, 0, axis)
    _describe(found, labels, scan)
    _write(request, scan, labels, found.objects, _overlay(volume, found, request, start))


def _check(request: Request) -> None:
    prompted = bool(request.boxes or request.points)
    if request.auto == prompted:
        raise UserError("prompt: give --auto or prompts (--box, --point), one of the two")
    if len(request.boxes) > 1 and request.points:
        raise UserError(
            f"--point: points go with one --box, not with {len(request.boxes)}; run once per object"
        )


def _start_slice(request: Request, count: int) -> int:
    if count == 1:
        return 0
    if request.slice_index is None:
        raise UserError(f"{request.image}: has {count} slices; say which by --slice")
    if not 0 <= request.slice_index < count:
        raise UserError(f"--slice: {request.slice_index}; {request.image} has 0 to {count - 1}")
    return request.slice_index


def _find_all(predictor: Predictor, volume: VolumePredictor, start: int) -> Segmentation:
    answers = AutomaticMaskGenerator(predictor).generate(volume.slices[start])
    labels = np.zeros(volume.slices.shape[:3], np.int32)
    labels[start] = label_map(answers, labels.shape[1:])
    answers = sorted(answers, key=lambda answer: -answer["area"])
    keys = ("predicted_iou", "stability_score", "point_coords", "prompt_box")
    return Segmentation(labels, [{k: a[k] for k in keys if k in a} for a in answers])


def _follow_prompts(volume: VolumePredictor, request: Request, start: int) -> Segmentation:
    """Objects one after another; where they overlap the one with the better score stays."""
    points = np.array(request.points, float).reshape(-1, 3)
    prompts: list[dict[str, Any]] = [{"box": box} for box in request.boxes] or [{}]
    if len(points):
        prompts[0] |= {"point_coords": points[:, :2], "point_labels": points[:, 2].astype(int)}
    labels = np.zeros(volume.slices.shape[:3], np.int32)
    best = np.full(labels.shape, -np.inf, np.float32)
    objects = []
    for label, prompt in enumerate(prompts, start=1):
        volume.clear_prompts()
        volume.add_prompt(start, **prompt)
        mask, scores = volume.propagate() if request.propagate else volume.predict_slices()
        mask &= scores[:, None, None] > best
        labels[mask] = label
        best = np.where(mask, scores[:, None, None], best)
        record = {name: np.asarray(value).tolist() for name, value in prompt.items()}
        reached = np.flatnonzero(np.isfinite(scores)).tolist()
        objects.append({**record, "predicted_iou": float(scores[start]), "slices": reached})
    return Segmentation(labels, objects)


def _describe(found: Segmentation, labels: np.ndarray, scan: Scan) -> None:
    """Adds label, voxels and volume; says which objects came out empty."""
    voxel_ml = float(np.prod(scan.spacing)) / 1000
    for label, record in enumerate(found.objects, start=1):
        voxels = int(np.count_nonzero(labels == label))
        record |= {"label": label, "voxels": voxels}
        if np.isfinite(voxel_ml):
            record["volume_ml"] = voxels * voxel_ml
        if voxels == 0:
            print(f"object {label}: nothing found; its mask is empty")
    if not found.objects:
        print("no object found; the mask is empty")


def _overlay(volume, found: Segmentation, request: Request, start: int) -> np.ndarray:
    """The prompted slice with the outlines of all objects and the prompts."""
    from medsam_jax.evaluation.figures import overlay

    image = volume.slices[start]
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    nothing = np.zeros(image.shape[:2], bool)
    box = np.array(request.boxes[0]) if len(request.boxes) == 1 else None
    points = np.array(request.points)[:, :2] if request.points else None
    return overlay(image, nothing, found.labels[start] > 0, box, points)


def _write(request: Request, scan: Scan, labels, objects, picture: np.ndarray) -> None:
    name = _name(request.image)
    mask_path = request.output / f"{name}_mask{_mask_suffix(request.image)}"
    overlay_path = request.output / f"{name}_overlay.png"
    scores_path = request.output / f"{name}.json"
    report = {"image": request.image, "checkpoint": request.checkpoint, "objects": objects}
    try:
        request.output.mkdir(parents=True, exist_ok=True)
        _whole(mask_path, lambda path: _write_mask(path, scan, labels))
        _whole(overlay_path, lambda path: _write_png(path, picture))
        _whole(scores_path, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    except OSError as error:
        raise UserError(
            f"{request.output}: cannot be written ({error.strerror or error})"
        ) from None
    for path in (mask_path, overlay_path, scores_path):
        print(path)


def _name(image: str) -> str:
    name = Path(image.split("#")[0]).name
    for suffix in (*_KEPT_SUFFIXES, *PICTURE_SUFFIXES, ".npz", ".dcm"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _mask_suffix(image: str) -> str:
    """The input's own; PNG for pictures, NIfTI for DICOM and arrays, MetaImage in one file."""
    lower = image.lower()
    if lower.endswith(PICTURE_SUFFIXES):
        return ".png"
    suffix = next((suffix for suffix in _KEPT_SUFFIXES if lower.endswith(suffix)), ".nii.gz")
    return ".mha" if suffix == ".mhd" else suffix


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes under another name first; the suffix stays, since it selects the format."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_mask(path: Path, scan: Scan, labels: np.ndarray) -> None:
    largest = int(labels.max(initial=0))
    dtype = np.uint8 if largest < 256 else np.uint16
    if path.suffix == ".png":
        _write_png(path, labels[0].astype(dtype))
        return
    import SimpleITK as sitk

    try:
        sitk.WriteImage(scan.to_image(labels.astype(dtype)), str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[-1]) from None


def _write_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(array).save(path)
