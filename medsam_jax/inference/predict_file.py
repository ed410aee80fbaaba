"""From one image file and its prompts to files: mask, overlay, record; montage and GIF of volumes.

The record, NAME.json, is written last: where it is, the other files are whole.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax import drawing
from medsam_jax.data.modality import is_ct
from medsam_jax.errors import FatalError, UserError
from medsam_jax.hub import load_model
from medsam_jax.inference import outputs, prompt_file
from medsam_jax.inference.dicom_seg import require_highdicom, write_dicom_seg
from medsam_jax.inference.object_records import COCO_FILE, measure
from medsam_jax.inference.predictor import Predictor
from medsam_jax.inference.prompt_file import ImagePrompts, ObjectPrompts
from medsam_jax.inference.request import Request, check_request, modality_of, start_slice
from medsam_jax.inference.segmentation import Segmentation, find_all, segment_objects
from medsam_jax.inference.volume import VolumePredictor
from medsam_jax.io.dicom import dicom_files
from medsam_jax.io.files import check_writable, jsonable, split_series, write_json, write_whole
from medsam_jax.io.geometry import Scan, slice_axis, slice_spacing
from medsam_jax.io.notes import log_notes
from medsam_jax.io.scans import read_scan
from medsam_jax.models.sam import Sam


@dataclasses.dataclass(frozen=True)
class _Input:
    """An image as it was read, and what its outputs are called."""

    image: str
    name: str
    scan: Scan
    axis: int  # of the scan's array, across which it is cut into slices
    modality: str | None
    window: str | None  # CT window; None: the checkpoint's
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

    Longer than other classes here: each step from an image to its files needs the request. Raises
    UserError for a request that contradicts itself, an unreadable prompt file, or an output folder
    that cannot be written.
    """

    def __init__(self, request: Request):
        check_request(request)
        check_writable(request.output)
        self.request = request
        self._by_image = prompt_file.from_json(request.prompts) if request.prompts else {}
        self._names = prompt_file.label_names(request.label_names)
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
        print("compiling for the first image, unless its programs are kept", file=sys.stderr)
        return Predictor(model)

    def settings(self, image: str, mask: str | None) -> dict[str, Any]:
        """All that an image's outputs depend on, JSON-able; equal settings need no second run."""
        kept = dataclasses.asdict(self.request)
        for name in ("image", "output", "prompts", "prompt_mask"):
            del kept[name]
        files = [split_series(image)[0], *([mask] if mask else [])]
        checkpoint = Path(self.request.checkpoint) / "model.json"
        files += [str(checkpoint)] if checkpoint.exists() else []
        modified = {file: Path(file).stat().st_mtime_ns for file in files if Path(file).exists()}
        found = self._by_image.get(_key(image), ImagePrompts([]))
        prompts = [dataclasses.asdict(o) for o in found.objects]
        kept |= {"modality": found.modality or kept["modality"]}
        kept |= {"window": found.window or kept["window"]}
        return jsonable(kept | {"modified": modified, "prompts": prompts})

    def _request_of(self, image: str) -> Request:
        """Returns the request with an image's own modality and window, where the file has them."""
        found = self._by_image.get(_key(image), ImagePrompts([]))
        modality, window = found.modality, found.window
        if modality and not window and not is_ct(modality):
            window = ""  # the command line's is for the other images
        window = self.request.window if window is None else window or None
        modality = modality or self.request.modality
        return dataclasses.replace(self.request, modality=modality, window=window)

    def without_image(self, images: list[str]) -> list[str]:
        """Returns the names in the file of prompts that none of the images has."""
        return sorted(set(self._by_image) - set(map(_key, images)))

    def run(self, image: str, name: str, mask: str | None = None) -> list[Path]:
        """Reads, predicts and writes; says which objects came out empty.

        Args:
          image: as `read_scan` takes it.
          name: of the outputs, which are returned, the record last.
          mask: a mask whose labels' boxes are the prompts.

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
        volume.set_volume(read.slices, read.modality, read.window, spacing, read.image)
        if self.request.auto:
            start = start_slice(self.request, image, len(read.slices))
            found = find_all(volume, start, self.request.auto_settings)
            _tell_filtered(name, found.filtered)
        else:
            found = segment_objects(volume, objects, self.request)
        measure(found.labels, found.objects, read.spacing)
        _tell_empty(name, found.objects)
        return self._write(read, volume.slices, found)

    def _read(self, image: str, name: str, mask: str | None) -> _Input:
        scan = read_scan(image)
        log_notes(scan)
        axis = slice_axis(scan)
        count = scan.array.shape[axis]
        suffix = outputs.mask_suffix(image, count, self.request.mask_format)
        if suffix == ".dcm":
            require_highdicom()
            if scan.affine is None and count > 1:
                raise UserError(
                    f"{image}: its frames state no positions, which a DICOM SEG needs; choose "
                    "another format, e.g. --mask_format nii.gz"
                )
        request = self._request_of(image)
        modality = modality_of(request, image, scan)
        return _Input(image, name, scan, axis, modality, request.window, suffix, mask)

    def _check_inputs_stay(self, read: _Input) -> None:
        """Raises UserError where an output would replace an image, a mask or prompts given."""
        given = [split_series(read.image)[0], read.mask, self.request.prompts]
        inputs = {Path(path).resolve() for path in given if path}
        suffixes = (f"_mask{read.suffix}", "_overlay.png", "_montage.png", ".gif", ".json")
        for file in (*(f"{read.name}{suffix}" for suffix in suffixes), COCO_FILE):
            path = self.request.output / file
            if path.resolve() in inputs:
                raise UserError(f"{read.image}: {path} is an input; choose another --output folder")

    def _objects(self, read: _Input) -> list[ObjectPrompts]:
        """The objects to look for, each prompt on a slice that exists."""
        image, count = read.image, len(read.slices)
        if self.request.auto:
            return []
        if read.mask is not None:
            return prompt_file.from_mask(read.mask, read.scan, read.axis, self._names)
        if self.request.prompts:
            if _key(image) not in self._by_image:
                known = ", ".join(list(self._by_image)[:5])
                raise UserError(
                    f"{image}: has no prompts in {self.request.prompts} (which names {known}); "
                    f"add {_key(image)!r}"
                )
            objects = self._by_image[_key(image)].objects
        else:
            objects = self._by_flags
        placed = []
        for found in objects:
            slices = {}
            for index, prompt in found.slices.items():
                at = start_slice(self.request, image, count) if index is None else index
                if at >= count:
                    raise UserError(f"{image}: a prompt is on slice {at}; it has 0 to {count - 1}")
                slices[at] = prompt
            placed.append(dataclasses.replace(found, slices=slices))
        return placed

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
            all_prompts = [prompt for record in found.objects for prompt in record["prompts"]]
            tiles = drawing.montage(slices, found.labels, all_prompts)
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
            "notes": read.scan.notes,
            "files": list(files),
            "objects": found.objects,
            **({"filtered": found.filtered} if found.filtered else {}),
            "settings": self.settings(read.image, read.mask),
        }
        write_json(output / f"{name}.json", record)
        return [output / file for file in (*files, f"{name}.json")]

    def _ct_window(self, read: _Input) -> str | None:
        """The window that CT in Hounsfield units was shown in."""
        if not is_ct(read.modality) or read.slices.dtype == np.uint8:
            return None
        return self._predictor.model.config.preprocessing.ct_window(read.window)

    def _write_mask(self, path: Path, read: _Input, found: Segmentation) -> None:
        labels = np.moveaxis(found.labels, 0, read.axis)
        if read.suffix != ".dcm":
            outputs.write_mask(path, read.scan, labels)
            return
        names = {r["label"]: r["name"] or f"object {r['label']}" for r in found.objects}
        sources, prompted = dicom_files(read.image), not self.request.auto
        write_dicom_seg(path, labels, sources, names, self.request.checkpoint, prompted)


def _key(image: str) -> str:
    """The key of an image in a JSON file of prompts."""
    path, uid = split_series(image)
    name = os.path.basename(os.path.abspath(path))
    return f"{name}#{uid}" if uid else name


def _tell_filtered(name: str, filtered: dict[str, int]) -> None:
    """Prints how many automatic masks each filter has dropped."""
    counts = dict(filtered)
    tried, kept = counts.pop("tried"), counts.pop("kept")
    dropped = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    print(f"{name}: {tried} masks tried, {kept} kept; dropped for {dropped}")


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
