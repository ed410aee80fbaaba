"""Runs the predict command on an image, or on a folder, which goes on where it stopped.

Of several processes each takes its share of a folder's images; process 0 takes a single image.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from medsam_jax.cli import progress
from medsam_jax.distributed import wait_for_all
from medsam_jax.errors import FatalError, UserError
from medsam_jax.inference.object_records import COCO_FILE, write_coco
from medsam_jax.inference.outputs import stem
from medsam_jax.inference.predict_file import FilePredictor
from medsam_jax.inference.request import Request
from medsam_jax.io.dicom import list_series
from medsam_jax.io.files import split_series
from medsam_jax.io.folders import IMAGE_SUFFIXES, search, visible_folders


def predict_path(request: Request) -> None:
    """Predicts an image, or every image of a folder, and lists what was written.

    In a folder, images whose outputs are there with the same settings are skipped, and one that
    fails does not stop the others. Raises UserError as `FilePredictor`, and for a folder when any
    image failed, each named before.
    """
    predictor = FilePredictor(request)
    images, left_out = _search(request.image)
    failed = 0
    if images is not None:
        failed = _run_folder(predictor, images, left_out)
    elif jax.process_index() == 0:
        mask = _mask_of(request, request.image, alone=True)
        for path in predictor.run(request.image, _name(request.image), mask):
            print(path)
    written = write_coco(request.output) if jax.process_index() == 0 else None
    wait_for_all("predicted")
    if failed:
        raise UserError(f"{failed} of {len(images)} images failed; they are named above")
    if written:
        print(written)


def find_images(path: str) -> list[str] | None:
    """Images and DICOM series of a folder, sorted; None where the path is a single image.

    A folder with nothing but one DICOM series is that image. Series may also lie in subfolders,
    one level down. Raises UserError for a folder with neither.
    """
    return _search(path)[0]


def _search(path: str) -> tuple[list[str] | None, list[str]]:
    """Returns `find_images`, and a line for each file or subfolder left out."""
    folder = Path(path)
    if not folder.is_dir():
        return None, []
    contents = search(folder, deep=False)
    left_out = list(contents.left_out)
    series = sorted(list_series(folder)) if contents.dicom else []
    images = [str(file) for file in contents.files] + [f"{folder}#{uid}" for uid in series]
    if contents.dicom and not series:
        left_out.append(f"{folder}: its {len(contents.dicom[folder])} DICOM files hold no series")
    for inner in visible_folders(folder):
        found, more = _subfolder(inner)
        images += found
        left_out += more
    if not images:
        raise UserError(
            f"{path}: no image in this folder; known are {', '.join(IMAGE_SUFFIXES)} and DICOM "
            "series" + "".join(f"; {line}" for line in left_out[:3])
        )
    is_series = len(images) == len(series) == 1
    return None if is_series else sorted(images), left_out


def _subfolder(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the DICOM series of a subfolder, and a line where it holds other images."""
    contents = search(folder)
    here = contents.dicom.pop(folder, [])
    series = sorted(list_series(folder)) if here else []
    images = [str(folder)] if len(series) == 1 else [f"{folder}#{uid}" for uid in series]
    others = len(contents.files) + len(contents.dicom) + len(contents.left_out)
    line = f"{folder}: {others} files or series in it; give this folder by --image"
    return images, [line] if others else []


def _run_folder(predictor: FilePredictor, images: list[str], left_out: list[str]) -> int:
    """Predicts this process's share and waits for the others; returns how many images failed."""
    request = predictor.request
    if request.output.resolve() == Path(request.image).resolve():
        raise UserError(f"--output: {request.output} is the folder of the images; give another")
    if request.prompt_mask and not Path(request.prompt_mask).is_dir():
        raise UserError(
            f"--prompt_mask: {request.prompt_mask} is no folder; give one mask for each image"
        )
    unused = [f"{request.prompts}: {n}: no such image" for n in predictor.without_image(images)]
    for line in left_out + unused if jax.process_index() == 0 else ():
        print(f"left out: {line}", file=sys.stderr)
    names = _names(images)
    share = images[jax.process_index() :: jax.process_count()]
    failures, skipped = [], 0
    for image in progress(share, "images"):
        try:
            mask = _mask_of(request, image, alone=False)
            if _is_finished(predictor, image, names[image], mask):
                skipped += 1
            else:
                predictor.run(image, names[image], mask)
        except FatalError:
            raise
        except UserError as error:
            failures.append(str(error))
    for text in failures:
        print(f"failed: {text}", file=sys.stderr)
    counts = np.array([len(share) - skipped - len(failures), skipped, len(failures)])
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(counts).sum(axis=0)
    done, skipped, failed = counts.tolist()
    if jax.process_index() == 0:
        told = f"{done} images done, {skipped} skipped (finished earlier), {failed} failed"
        print(f"{request.output}: {told}")
    return failed


def _name(image: str) -> str:
    """The stem, of which outputs are named; "coco_image" where a record would be `coco.json`."""
    name = stem(image)
    return f"{name}_image" if f"{name}.json".lower() == COCO_FILE else name


def _names(images: list[str]) -> dict[str, str]:
    """Names of outputs: stems, or whole file names where stems are the same."""
    counts = Counter(_name(image).lower() for image in images)
    names = {}
    for image in images:
        folder, uid = split_series(image)
        whole = Path(folder).name + (f"_{uid}" if uid else "")
        names[image] = _name(image) if counts[_name(image).lower()] == 1 else whole
    return names


def _mask_of(request: Request, image: str, alone: bool) -> str | None:
    """The mask that prompts an image: the file given, or the file named as the image in a folder.

    A folder of masks may add "_mask" to the names, as this command does.
    """
    if request.prompt_mask is None:
        return None
    given = Path(request.prompt_mask)
    if alone and not (given.is_dir() and not list_series(given)):
        return request.prompt_mask
    wanted = (stem(image), f"{stem(image)}_mask")
    found = sorted(p for p in given.iterdir() if p.is_file() and stem(p.name) in wanted)
    found = [p for p in found if p.name.lower().endswith(IMAGE_SUFFIXES)]
    if len(found) != 1:
        listed = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{image}: its mask in {given} must be one {wanted[0]}.*; found {listed}")
    return str(found[0])


def _is_finished(predictor: FilePredictor, image: str, name: str, mask: str | None) -> bool:
    """Whether the record is there, made with the same settings, and all files that it names."""
    output = predictor.request.output
    try:
        record = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
        files = [output / file for file in record["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    settings = record.get("settings") == predictor.settings(image, mask)
    return settings and all(file.exists() for file in files)
