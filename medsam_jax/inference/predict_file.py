"""From one image file and its prompts to files: mask, overlay, record; montage and GIF of volumes.

The record, NAME.json, is written last: where it is, the other files are whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax import drawing
from medsam_jax.errors import FatalError, UserError
from medsam_jax.hub import load_model
from medsam_jax.inference import coco, outputs, prompt_file
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator, label_map
from medsam_jax.inference.describe import measure
from medsam_jax.inference.dicom_seg import require_highdicom, write_dicom_seg
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.prompt_file import ObjectPrompts, arguments
from medsam_jax.inference.volume import VolumePredictor, clean
from medsam_jax.io.files import jsonable, write_json, write_whole
from medsam_jax.io.scans import Scan, dicom_files, is_dicom, read_scan, slice_axis, slice_spacing
from medsam_jax.models.sam import Sam

# Only CT changes what is done: HU and a window. The list catches misspellings of it.
MODALITIES = ("CT", "MR", "MRI", "US", "PT", "PET", "NM", "XR", "CR", "DX", "MG", "XA", "RF", "OCT")
MODALITIES += ("FUNDUS", "ENDOSCOPY", "DERMOSCOPY", "MICROSCOPY", "PATHOLOGY", "OTHER")
FOLLOW = ("propagate", "interpolate", "off")


@dataclasses.dataclass(frozen=True)
class Request:
    """What `python -m medsam_jax.predict` is asked for."""

    checkpoint: str
    image: str
    output: Path
    boxes: list[list[float]] = dataclasses.field(default_factory=list)
    points: list[list[float]] = dataclasses.field(default_factory=list)  # x, y, label
    prompts: str | None = None  # JSON file
    prompt_mask: str | None = None  # file, or folder of files named as the images
    auto: bool = False
    modality: str | None = None
    window: str | None = None
    slice_index: int | None = None
    follow: str = "propagate"  # between and beyond prompted slices, see FOLLOW
    largest_component: bool = False
    fill_holes: bool = False
    mask_format: str | None = None
    gif: bool = False


@dataclasses.dataclass
class Segmentation:
    """Labels of slices along the first axis, and what to say of each object."""

    labels: np.ndarray  # int32 [Z, H, W]
    objects: list[dict[str, Any]]  # each with "label", "name", "prompts", ...


@dataclasses.dataclass(frozen=True)
class _Input:
    """An image as it was read, and what its outputs are called."""

    image: str
    name: str
    scan: Scan
    axis: int  # of the scan's array, across which it is cut into slices
    modality: str | None
    suffix: str  # of the mask's file
    mask: str | None  # whose labels are the prompts

    @property
    def slices(self) -> np.ndarray:
        return np.moveaxis(self.scan.array, self.axis, 0)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between slices, rows and columns; NaN where unknown."""
        return slice_spacing(self.scan, self.axis)


class FilePredictor:
    """Answers one image after another; the model is loaded for the first one.

    Raises:
      UserError: a request that contradicts itself, an unreadable prompt file, an output folder that
        cannot be written.
    """

    def __init__(self, request: Request):
        _check(request)
        outputs.check_writable(request.output)
        self.request = request
        self._by_image = prompt_file.from_json(request.prompts) if request.prompts else {}
        self._by_flags = prompt_file.from_flags(request.boxes, request.points)

    @functools.cached_property
    def _predictor(self) -> Predictor:
        try:
            model = load_model(self.request.checkpoint)
        except UserError as error:
            raise FatalError(str(error)) from None
        if not isinstance(model, Sam):
            raise FatalError(
                f"{self.request.checkpoint}: takes no prompts; use a SAM or MedSAM checkpoint"
            )
        return Predictor(model)

    def settings(self, image: str, mask: str | None) -> dict[str, Any]:
        """What the outputs of an image depend on, JSON-able; equal settings need no second run."""
        kept = dataclasses.asdict(self.request)
        for name in ("image", "output", "prompts", "prompt_mask"):
            del kept[name]
        files = [image.split("#")[0], *([mask] if mask else [])]
        checkpoint = Path(self.request.checkpoint) / "model.json"
        files += [str(checkpoint)] if checkpoint.exists() else []
        modified = {file: Path(file).stat().st_mtime_ns for file in files if Path(file).exists()}
        prompts = [dataclasses.asdict(o) for o in self._by_image.get(_key(image), [])]
        return jsonable(kept | {"modified": modified, "prompts": prompts})

    def run(self, image: str, name: str, mask: str | None = None) -> list[Path]:
        """Reads, predicts and writes; says which objects came out empty.

        Args:
          image: as `read_scan` takes it.
          name: of the outputs.
          mask: a mask whose labels' boxes are the prompts.

        Returns:
          The files written, the record last.

        Raises:
          FatalError: no model, or no place to write: other images would fail alike.
          UserError: what reading and prompting raise, naming the image; nothing is left
            half-written.
        """
        try:
            return self._run(image, name, mask)
        except FatalError:
            raise
        except UserError as error:
            text = str(error)
            raise UserError(text if image in text else f"{image}: {text}") from None

    def _run(self, image: str, name: str, mask: str | None) -> list[Path]:
        read = self._read(image, name, mask)
        self._check_inputs_stay(read)
        objects = self._objects(read)
        volume = VolumePredictor(self._predictor)
        is_known = np.isfinite(read.spacing).all()
        spacing = read.spacing if is_known else (1.0, 1.0, 1.0)  # cubes, as set_volume has it
        volume.set_volume(read.slices, read.modality, self.request.window, spacing)
        if self.request.auto:
            start = _start(self.request, image, len(read.slices))
            found = _find_all(self._predictor, volume, start)
        else:
            found = self._follow(volume, objects)
        measure(found.labels, found.objects, read.spacing)
        _tell_empty(name, found.objects)
        return self._write(read, volume.slices, found)

    def _read(self, image: str, name: str, mask: str | None) -> _Input:
        scan = read_scan(image)
        axis = slice_axis(scan)
        count = scan.array.shape[axis]
        suffix = outputs.mask_suffix(image, count, self.request.mask_format)
        if suffix == ".dcm":
            require_highdicom()
        modality = _modality(self.request, image, scan)
        return _Input(image, name, scan, axis, modality, suffix, mask)

    def _check_inputs_stay(self, read: _Input) -> None:
        """Raises UserError where an output would replace an image, a mask or prompts given."""
        given = [read.image.split("#")[0], read.mask, self.request.prompts]
        inputs = {Path(path).resolve() for path in given if path}
        suffixes = (f"_mask{read.suffix}", "_overlay.png", "_montage.png", ".gif", ".json")
        for file in (*(f"{read.name}{suffix}" for suffix in suffixes), coco.FILE):
            path = self.request.output / file
            if path.resolve() in inputs:
                raise UserError(f"{read.image}: {path} is an input; choose another --output folder")

    def _objects(self, read: _Input) -> list[ObjectPrompts]:
        """The objects to look for, each prompt on a slice that exists."""
        image, count = read.image, len(read.slices)
        if self.request.auto:
            return []
        if read.mask is not None:
            return prompt_file.from_mask(read.mask, read.scan, read.axis)
        if self.request.prompts:
            if _key(image) not in self._by_image:
                known = ", ".join(list(self._by_image)[:5])
                raise UserError(
                    f"{image}: has no prompts in {self.request.prompts} (which names {known}); "
                    f"add {_key(image)!r}"
                )
            objects = self._by_image[_key(image)]
        else:
            objects = self._by_flags
        placed = []
        for found in objects:
            slices = {}
            for index, prompt in found.slices.items():
                at = _start(self.request, image, count) if index is None else index
                if at >= count:
                    raise UserError(f"{image}: a prompt is on slice {at}; it has 0 to {count - 1}")
                slices[at] = prompt
            placed.append(dataclasses.replace(found, slices=slices))
        return placed

    def _follow(self, volume: VolumePredictor, objects: list[ObjectPrompts]) -> Segmentation:
        """Objects one after another; where they overlap the one with the better score stays."""
        for found in objects:  # all are checked before the first is encoded
            volume.clear_prompts()
            _prompt(volume, found)
        labels = np.zeros(volume.slices.shape[:3], np.int32)
        best = np.full(labels.shape, -np.inf, np.float32)
        records = []
        for found in objects:
            volume.clear_prompts()
            _prompt(volume, found)
            mask, scores = self._answer(volume)
            if self.request.largest_component or self.request.fill_holes:
                mask = clean(mask, self.request.largest_component, self.request.fill_holes)
            mask &= scores[:, None, None] > best
            labels[mask] = found.label
            best = np.where(mask, scores[:, None, None], best)
            reached = np.flatnonzero(np.isfinite(scores)).tolist()
            records.append(
                {
                    "label": found.label,
                    "name": found.name,
                    "prompts": [{"slice": i} | prompt for i, prompt in found.slices.items()],
                    "predicted_iou": float(np.nanmean(scores)),
                    "slice_scores": {index: float(scores[index]) for index in reached},
                }
            )
        return Segmentation(labels, records)

    def _answer(self, volume: VolumePredictor) -> tuple[np.ndarray, np.ndarray]:
        if len(volume.slices) == 1 or self.request.follow == "off":
            return volume.predict_slices()
        if self.request.follow == "interpolate":
            return volume.interpolate()
        return volume.propagate()

    def _write(self, read: _Input, slices: np.ndarray, found: Segmentation) -> list[Path]:

        output, name, is_picture = self.request.output, read.name, len(slices) == 1
        shown = _slice_to_show(found)
        prompts = [p for r in found.objects for p in r["prompts"] if p["slice"] == shown]
        overlay = drawing.draw(slices[shown], found.labels[shown], prompts)
        files: dict[str, Callable[[Path], None]] = {
            f"{name}_mask{read.suffix}": lambda path: self._write_mask(path, read, found),
            f"{name}_overlay.png": lambda path: outputs.write_picture(path, overlay),
        }
        if not is_picture:
            tiles = drawing.montage(slices, found.labels)
            files[f"{name}_montage.png"] = lambda path: outputs.write_picture(path, tiles)
            if self.request.gif:
                files[f"{name}.gif"] = lambda path: drawing.write_gif(path, slices, found.labels)
        for file, write in files.items():
            write_whole(output / file, write)
        record = {
            "image": read.image,
            "checkpoint": self.request.checkpoint,
            "modality": read.modality,
            "ct_window": self._ct_window(read),
            "is_picture": is_picture,
            "shape": list(found.labels.shape[1 if is_picture else 0 :]),
            "slice_axis": read.axis,
            "spacing_mm": read.spacing,
            "files": list(files),
            "objects": found.objects,
            "settings": self.settings(read.image, read.mask),
        }
        write_json(output / f"{name}.json", record)
        return [output / file for file in (*files, f"{name}.json")]

    def _ct_window(self, read: _Input) -> str | None:
        """The window that CT in Hounsfield units was shown in."""
        if (read.modality or "").upper() != "CT" or read.slices.dtype == np.uint8:
            return None
        return self._predictor.model.config.preprocessing.ct_window(self.request.window)

    def _write_mask(self, path: Path, read: _Input, found: Segmentation) -> None:
        labels = np.moveaxis(found.labels, 0, read.axis)
        if read.suffix != ".dcm":
            outputs.write_mask(path, read.scan, labels)
            return
        names = {r["label"]: r["name"] or f"object {r['label']}" for r in found.objects}
        sources, prompted = dicom_files(read.image), not self.request.auto
        write_dicom_seg(path, labels, sources, names, self.request.checkpoint, prompted)


def _check(request: Request) -> None:
    ways = {
        "--box, --point": bool(request.boxes or request.points),
        "--prompts": bool(request.prompts),
        "--prompt_mask": bool(request.prompt_mask),
        "--auto": request.auto,
    }
    given = [way for way, is_given in ways.items() if is_given]
    if len(given) != 1:
        raise UserError(
            f"prompt: {' and '.join(given) or 'nothing'} given; give one of {'; '.join(ways)}"
        )
    if request.auto and (request.largest_component or request.fill_holes):
        raise UserError(
            "--largest_component, --fill_holes: --auto gives objects as they are found; leave them "
            "out, or prompt the objects"
        )
    if request.prompt_mask and request.slice_index is not None:
        raise UserError(
            f"--slice: {request.slice_index}; a --prompt_mask says its slices itself, leave it out"
        )
    if request.modality is not None and request.modality.upper() not in MODALITIES:
        raise UserError(
            f"--modality: {request.modality!r} is unknown; use one of {', '.join(MODALITIES)}"
        )
    if request.window and (request.modality or "CT").upper() != "CT":
        raise UserError(
            f"--window: {request.window!r} is for CT, the modality is {request.modality}; leave it "
            "out"
        )
    for name, value, known in (
        ("--follow", request.follow, FOLLOW),
        ("--mask_format", request.mask_format, (None, *outputs.MASK_FORMATS)),
    ):
        if value not in known:
            raise UserError(f"{name}: {value!r}; use one of {', '.join(filter(None, known))}")


def _key(image: str) -> str:
    """How a JSON file of prompts names an image."""
    folder, hash_, uid = image.partition("#")
    return Path(folder).resolve().name + hash_ + uid


def _start(request: Request, image: str, count: int) -> int:
    """The slice that the command line names."""
    if count == 1 and request.slice_index in (None, 0):
        return 0
    if count == 1:
        raise UserError(f"--slice: {request.slice_index}; {image} has one slice, leave it out")
    if request.slice_index is None:
        raise UserError(f"{image}: has {count} slices; say which by --slice")
    if not 0 <= request.slice_index < count:
        raise UserError(f"--slice: {request.slice_index}; {image} has 0 to {count - 1}")
    return request.slice_index


def _modality(request: Request, image: str, scan: Scan) -> str | None:
    """As given, or a DICOM file's own; says so where numbers look like HU and nobody said CT."""
    modality = request.modality
    if modality is None and is_dicom(image):
        modality = _dicom_modality(image)
    if request.window and (modality or "").upper() != "CT":
        found = modality or "none"
        raise UserError(f"--window: {request.window!r} needs --modality CT; {image} has {found}")
    if request.window and scan.array.dtype == np.uint8:
        raise UserError(f"--window: {image} has 8 bits, windowed already; leave the window out")
    if modality is None and scan.array.min() < -500:
        print(f"{image}: values down to {scan.array.min():g} look like HU; give --modality CT")
    return modality


def _dicom_modality(image: str) -> str | None:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(dicom_files(image)[0])
    reader.ReadImageInformation()
    tag = "0008|0060"
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else None


def _prompt(volume: VolumePredictor, found: ObjectPrompts) -> None:
    for index, prompt in found.slices.items():
        try:
            volume.add_prompt(index, **arguments(prompt))
        except UserError as error:
            raise UserError(f"object {found.label}, slice {index}: {error}") from None


def _find_all(predictor: Predictor, volume: VolumePredictor, start: int) -> Segmentation:
    generator = AutomaticMaskGenerator(predictor, output_mode="uncompressed_rle")
    answers = generator.generate_normalised(volume.slices[start])
    labels = np.zeros(volume.slices.shape[:3], np.int32)
    labels[start] = label_map(answers, labels.shape[1:])
    records = []
    for label, answer in enumerate(sorted(answers, key=lambda a: -a["area"]), start=1):
        prompts: list[dict[str, Any]] = [{"slice": start}]
        scores = {key: answer[key] for key in ("predicted_iou", "stability_score")}
        records.append({"label": label, "name": None, "prompts": prompts} | scores)
    return Segmentation(labels, records)


def _tell_empty(name: str, objects: list[dict[str, Any]]) -> None:
    for record in objects:
        if not record.get("voxels", record.get("area_px")):
            print(f"{name}: object {record['label']}: nothing found; its mask is empty")
    if not objects:
        print(f"{name}: no object found; the mask is empty")


def _slice_to_show(found: Segmentation) -> int:
    """The prompted slice with most objects' pixels; without any, that with most of them."""
    pixels = np.count_nonzero(found.labels, axis=(1, 2))
    prompted = {p["slice"] for record in found.objects for p in record["prompts"]}
    return max(prompted or range(len(pixels)), key=lambda index: pixels[index])
