"""Makes ``lite_medsam_<case>.npz``: PyTorch LiteMedSAM on real slices, for tests without PyTorch.

Run from the repository root in the environment of ``make test-parity``:

    python -m tests.golden.make_lite_medsam

The slices come from the scans of the ``pyradiomics-bhklab`` package (BSD-3). Each file holds the
slice as LiteMedSAM sees it before its min-max step, the prompts, and what PyTorch answers. Reading
and resizing are done here with SimpleITK and OpenCV alone, so that the files are independent of the
library's own data path.

Outputs are sampled with a stride of 5: it is prime to the 4 by which the mask decoder upsamples, so
every phase of its transposed convolutions is looked at, at a twenty-fifth of the size.
"""

import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import SimpleITK as sitk

from tests.golden.lite_medsam_cases import CASES, PROMPT_KINDS, STRIDE, prompts_of
from tests.parity.torch_models import (
    download_package,
    load_torch_lite_medsam,
    torch_decode,
    torch_encode,
)

SCANS = "pyradiomics-bhklab==3.1.4"
SCANS_SHA256 = "a44a087efc4ede91b5dfa5cf0de58ea3596bfaec1ef2484f278504b0a8fd5ffb"
IMAGE_SIZE = 256


def read_scan(archive: tarfile.TarFile, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Image and label volumes [Z, Y, X] of one case of the package."""
    volumes = []
    with tempfile.TemporaryDirectory() as folder:
        for part in ("image", "label"):
            member = next(m for m in archive.getmembers() if m.name.endswith(f"{case}_{part}.nrrd"))
            path = Path(folder, f"{part}.nrrd")
            path.write_bytes(archive.extractfile(member).read())
            volumes.append(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    return volumes[0], volumes[1]


def to_uint8(volume: np.ndarray, modality: str) -> np.ndarray:
    """CT clipped to [-500, 1000] HU, MR to percentiles 0.5 and 99.5 above 0; then [0, 255]."""
    volume = volume.astype(np.float64)
    if modality == "CT":
        low, high = -500.0, 1000.0
    else:
        low, high = np.percentile(volume[volume > 0], [0.5, 99.5])
    return np.uint8((volume.clip(low, high) - low) / (high - low) * 255)


def make_slice(archive: tarfile.TarFile, case: str, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """The slice with most of the object, longest side 256: image uint8 [h, w], mask bool [h, w]."""
    image, label = read_scan(archive, case)
    mask = label == 1
    index = int(mask.sum(axis=(1, 2)).argmax())
    image, mask = to_uint8(image, modality)[index], mask[index]
    height, width = image.shape
    scale = IMAGE_SIZE / max(height, width)
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image, cv2.resize(np.uint8(mask), size, interpolation=cv2.INTER_NEAREST) > 0


def network_input(image: np.ndarray) -> np.ndarray:
    """LiteMedSAM's input [1, 256, 256, 3]: min-max to [0, 1], then zeros below and right."""
    image = image.astype(np.float32)
    image = (image - image.min()) / max(image.max() - image.min(), 1e-8)
    padded = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    padded[0, : image.shape[0], : image.shape[1]] = image[..., None]
    return padded


def make_golden(model, image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    rows, columns = np.nonzero(mask)
    box = np.array([columns.min(), rows.min(), columns.max(), rows.max()], np.float32)
    center = np.abs(rows - rows.mean()) + np.abs(columns - columns.mean())
    inside = np.array([columns[center.argmin()], rows[center.argmin()]], np.float32)
    points = np.stack([inside, box[:2] - 2, [box[2], inside[1]]]).astype(np.float32)

    embedding = torch_encode(model, network_input(image))[0]
    box_logits, _ = torch_decode(model, embedding, {"boxes": box[None]}, multimask_output=False)
    golden = {
        "image": image,
        "box": box,
        "points": points,  # the first inside the object, the second outside, the third on its edge
        "labels": np.array([1, 0, 1], np.int32),
        # a mask prompt is logits of an earlier answer; quarters keep the file small and exact
        "mask_quarters": np.int8((box_logits[0, 0] * 4).round().clip(-127, 127)),
        "embedding": embedding[::STRIDE, ::STRIDE],
        "embedding_max": np.abs(embedding).max(),
    }
    for kind in PROMPT_KINDS:
        for multimask in (False, True):
            logits, iou = torch_decode(model, embedding, prompts_of(golden, kind), multimask)
            name = f"{kind}_{'multi' if multimask else 'single'}"
            golden[f"{name}_logits"] = logits[0, :, ::STRIDE, ::STRIDE]
            golden[f"{name}_logits_max"] = np.abs(logits).max()
            golden[f"{name}_iou"] = iou[0]
    return golden


def main():
    model = load_torch_lite_medsam()
    with tarfile.open(download_package(SCANS, SCANS_SHA256)) as archive:
        for case, modality in CASES.items():
            path = Path(__file__).with_name(f"lite_medsam_{case}.npz")
            np.savez_compressed(path, **make_golden(model, *make_slice(archive, case, modality)))
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
