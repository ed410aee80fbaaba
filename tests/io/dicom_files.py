"""Writes DICOM files slice by slice."""

from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian as DEFLATED,
)
from pydicom.uid import (
    ExplicitVRLittleEndian as EXPLICIT,
)
from pydicom.uid import (
    ImplicitVRLittleEndian as IMPLICIT,
)
from pydicom.uid import (
    RLELossless as RLE,
)
from pydicom.uid import (
    generate_uid,
)

MR = "1.2.840.10008.5.1.4.1.1.4"
__all__ = ["DEFLATED", "EXPLICIT", "IMPLICIT", "RLE"]
__all__ += ["write_compressed", "write_enhanced", "write_slice"]


def write_compressed(path: Path, plane: np.ndarray, syntax: str, stream: bytes) -> None:
    """Writes one slice whose pixels are a JPEG or JPEG 2000 stream of `plane`."""
    write_slice(path, plane, bits=plane.dtype.itemsize * 8)
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path, enforce_file_format=True)


def write_enhanced(path: Path, array: np.ndarray, spacing=(0.8, 0.7, 3.0)) -> None:
    """Writes a volume as one enhanced MR file, a frame for each slice."""
    write_slice(path, array[0], spacing=spacing)
    ds = dcmread(path)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(ds, name)
    ds.NumberOfFrames, ds.PixelData = len(array), array.tobytes()
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing = [f"{spacing[1]:.6g}", f"{spacing[0]:.6g}"]
    measures.SliceThickness = f"{spacing[2]:.6g}"
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for index in range(len(array)):
        place, scaling, frame = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, f"{spacing[2] * index:.6g}"]
        scaling.RescaleIntercept, scaling.RescaleSlope, scaling.RescaleType = 0, 1, "US"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [scaling]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.save_as(path, enforce_file_format=True)


def write_slice(
    path: Path,
    plane: np.ndarray,
    position=(0.0, 0.0, 0.0),
    direction=None,
    spacing=(0.8, 0.7, 3.0),
    number: int = 1,
    uid: str = "1.2.3.4",
    scaling: tuple[float, float] | None = None,
    syntax: str = EXPLICIT,
    bits: int | None = None,
    tags: dict | None = None,
) -> Path:
    """Writes one slice; `direction` has columns, `spacing` is in x, y, z order.

    `tags` are set last, by keyword; None removes one.
    """
    direction = np.eye(3) if direction is None else direction
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT if syntax == RLE else syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MR
    instance = generate_uid(entropy_srcs=[uid, str(number), str(position)])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = instance
    ds.StudyInstanceUID = ds.FrameOfReferenceUID = "1.2.3"
    ds.SeriesInstanceUID, ds.InstanceNumber, ds.Modality = uid, number, "MR"
    ds.ImagePositionPatient = [f"{value:.9g}" for value in position]
    ds.ImageOrientationPatient = [f"{value:.12f}" for value in direction[:, :2].T.ravel()]
    ds.PixelSpacing = [f"{spacing[1]:.6g}", f"{spacing[0]:.6g}"]
    ds.SliceThickness = f"{spacing[2]:.6g}"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    if plane.ndim == 3:
        ds.NumberOfFrames = len(plane)
    ds.Rows, ds.Columns = plane.shape[-2:]
    ds.BitsAllocated = plane.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(plane.dtype.kind == "i")
    if scaling is not None:
        ds.RescaleSlope, ds.RescaleIntercept = scaling
    content = plane.tobytes()
    content += b"\0" * (len(content) % 2)
    ds.add_new("PixelData", "OW" if ds.BitsAllocated > 8 else "OB", content)
    if syntax == RLE:
        ds.compress(RLE, generate_instance_uid=False)
    for keyword, value in (tags or {}).items():
        if value is None:
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path
