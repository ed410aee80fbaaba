"""The request of the predict command: its fields, and which combinations of them make sense."""

import dataclasses
from pathlib import Path

import numpy as np

from medsam_jax.data.modality import is_ct
from medsam_jax.errors import UserError
from medsam_jax.inference.outputs import MASK_FORMATS
from medsam_jax.io.dicom import dicom_modality, is_dicom
from medsam_jax.io.geometry import Scan

# Only CT changes what is done: HU and a window. The list catches misspellings of it.
MODALITIES = ("CT", "MR", "MRI", "US", "PT", "PET", "NM", "XR", "CR", "DX", "MG", "XA", "RF", "OCT")
MODALITIES += ("FUNDUS", "ENDOSCOPY", "DERMOSCOPY", "MICROSCOPY", "PATHOLOGY", "OTHER")
FOLLOW = ("propagate", "interpolate", "off")


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags of `python -m medsam_jax.predict`."""

    checkpoint: str
    image: str
    output: Path
    boxes: list[list[float]] = dataclasses.field(default_factory=list)
    points: list[list[float]] = dataclasses.field(default_factory=list)  # x, y, label
    prompts: str | None = None  # JSON file
    prompt_mask: str | None = None  # file, or folder of files named as the images
    label_names: list[str] = dataclasses.field(default_factory=list)  # ID=NAME, of `prompt_mask`
    auto: bool = False
    auto_settings: dict[str, float] = dataclasses.field(default_factory=dict)  # of the generator
    modality: str | None = None
    window: str | None = None
    slice_index: int | None = None
    follow: str = "propagate"  # between and beyond prompted slices, see FOLLOW
    largest_component: bool = False
    fill_holes: bool = False
    mask_format: str | None = None
    gif: bool = False


def check_request(request: Request) -> None:
    """Raises UserError for a request that contradicts itself."""
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
    if request.label_names and not request.prompt_mask:
        raise UserError(
            f"--labels: {','.join(request.label_names)}; names the labels of a --prompt_mask, "
            "leave it out"
        )
    if request.auto_settings and not request.auto:
        raise UserError(f"--{next(iter(request.auto_settings))}: is for --auto; leave it out")
    if request.auto and (request.largest_component or request.fill_holes):
        raise UserError(
            "--largest_component, --fill_holes: --auto gives objects as they are found; leave them "
            "out, or prompt the objects"
        )
    if request.prompt_mask and request.slice_index is not None:
        raise UserError(
            f"--slice: {request.slice_index}; a --prompt_mask says its slices itself, leave it out"
        )
    check_modality("--modality:", request.modality)
    if request.window and request.modality and not is_ct(request.modality):
        raise UserError(
            f"--window: {request.window!r} is for CT, the modality is {request.modality}; leave it "
            "out"
        )
    for name, value, known in (
        ("--follow", request.follow, FOLLOW),
        ("--mask_format", request.mask_format, (None, *MASK_FORMATS)),
    ):
        if value not in known:
            raise UserError(f"{name}: {value!r}; use one of {', '.join(filter(None, known))}")


def check_modality(where: str, modality: str | None) -> None:
    """Raises UserError for an unknown modality; None is not given."""
    if modality is not None and modality.upper() not in MODALITIES:
        raise UserError(f"{where} {modality!r} is unknown; use one of {', '.join(MODALITIES)}")


def start_slice(request: Request, image: str, count: int) -> int:
    """The slice of an image with `count` slices that the command line names.

    Raises:
      UserError: none named, or one that the image does not have.
    """
    if count == 1 and request.slice_index in (None, 0):
        return 0
    if count == 1:
        raise UserError(f"--slice: {request.slice_index}; {image} has one slice, leave it out")
    if request.slice_index is None:
        raise UserError(f"{image}: has {count} slices; say which by --slice")
    if not 0 <= request.slice_index < count:
        raise UserError(f"--slice: {request.slice_index}; {image} has 0 to {count - 1}")
    return request.slice_index


def modality_of(request: Request, image: str, scan: Scan) -> str | None:
    """The modality as given, or a DICOM file's own; prints a hint where values look like HU.

    Raises:
      UserError: a window for an image that is not CT in Hounsfield units.
    """
    modality = request.modality
    if modality is None and is_dicom(image):
        modality = dicom_modality(image) or None
    if request.window and not is_ct(modality):
        found = modality or "none"
        raise UserError(f"--window: {request.window!r} needs --modality CT; {image} has {found}")
    if request.window and scan.array.dtype == np.uint8:
        raise UserError(f"--window: {image} has 8 bits, windowed already; leave the window out")
    if modality is None and scan.array.min() < -500:
        print(f"{image}: values down to {scan.array.min():g} look like HU; give --modality CT")
    return modality
