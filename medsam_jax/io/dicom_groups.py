"""Finds place, spacing and scaling of each DICOM frame: by file, or by functional groups."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.dicom_frames import Frame
from medsam_jax.io.dicom_headers import EXPORT, TELLING, VECTORS, Header

# (sequence, tag) of functional groups by which frames at one position may differ.
_TELLING_GROUPS = (
    ("TemporalPositionSequence", "TemporalPositionTimeOffset"),
    ("FrameContentSequence", "TemporalPositionIndex"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ("MRDiffusionSequence", "DiffusionBValue"),
    ("MREchoSequence", "EffectiveEchoTime"),
    ("MRImageFrameTypeSequence", "FrameType"),
    ("CTImageFrameTypeSequence", "FrameType"),
    ("CTReconstructionSequence", "ConvolutionKernel"),
    ("SegmentIdentificationSequence", "ReferencedSegmentNumber"),
    ("FrameContentSequence", "StackID"),
    ("FrameContentSequence", "FrameAcquisitionNumber"),
    ("FrameContentSequence", "DimensionIndexValues"),
)
_CM = 3  # code of the unit of an ultrasound region


def frames_of(header: Header) -> list[Frame]:
    """Returns the frames of a file in the file's order.

    Raises:
      UserError: functional groups of another number than frames, several stacks.
    """
    if header.get("PerFrameFunctionalGroupsSequence"):
        return _enhanced(header)
    position, axes = _first_place(header)
    spacing, notes = _plane_spacing(header)
    scaling = _scaling(header, header.get("RescaleSlope"), header.get("RescaleIntercept"))
    traits = {key: str(header.get(key)) for key in TELLING if header.get(key) is not None}
    if header.frame_count == 1:
        return [Frame(header, 0, position, axes, spacing, *scaling, traits, notes)]
    places, more = _places(header, position, axes)
    notes += more
    return [
        Frame(header, index, place, axes, spacing, *scaling, traits, notes)
        for index, place in enumerate(places)
    ]


def _enhanced(header: Header) -> list[Frame]:
    groups = list(header.get("PerFrameFunctionalGroupsSequence"))
    if len(groups) != header.frame_count:
        raise UserError(
            f"{header.file}: describes {len(groups)} of its {header.frame_count} frames; {EXPORT}"
        )
    shared = header.get("SharedFunctionalGroupsSequence")
    shared = shared[0] if shared else None
    frames = []
    for index, group in enumerate(groups):

        def value(sequence: str, keyword: str, group: Any = group) -> Any:
            for part in (group, shared):
                items = part.get(sequence) if part is not None else None
                if items and items[0].get(keyword) is not None:
                    return items[0].get(keyword)
            return None

        scaling = [
            value("PixelValueTransformationSequence", key)
            for key in ("RescaleSlope", "RescaleIntercept")
        ]
        scaling = [
            given if given is not None else header.get(key)
            for given, key in zip(scaling, ("RescaleSlope", "RescaleIntercept"), strict=True)
        ]
        found = {key: value(sequence, key) for sequence, key in reversed(_TELLING_GROUPS)}
        frames.append(
            Frame(
                header,
                index,
                numbers(value("PlanePositionSequence", "ImagePositionPatient"), 3),
                numbers(value("PlaneOrientationSequence", "ImageOrientationPatient"), 6),
                _pixel_spacing(value("PixelMeasuresSequence", "PixelSpacing")),
                *_scaling(header, *scaling),
                {k: str(found[k]) for _, k in _TELLING_GROUPS if found[k] is not None},
            )
        )
    stacks = list(dict.fromkeys(frame.traits.get("StackID", "") for frame in frames))
    if len(stacks) > 1:
        raise UserError(
            f"{header.file}: holds {len(stacks)} stacks of frames (StackID "
            f"{', '.join(stacks[:4])}); save each as a file of its own"
        )
    return frames


def _first_place(header: Header) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Returns position and orientation of the first frame; of nuclear medicine, the detector's."""
    detectors = header.get("DetectorInformationSequence")
    found = []
    for keyword, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6)):
        value = numbers(header.get(keyword), count)
        if value is None and detectors:
            value = numbers(detectors[0].get(keyword), count)
        found.append(value)
    return found[0], found[1]


def _places(
    header: Header, position: Any, axes: Any
) -> tuple[list[tuple[float, ...] | None], tuple[str, ...]]:
    """Returns the places of frames along the normal, and notes; None where they are not stated.

    A dose grid states offsets, nuclear medicine one distance. Frames of a cine have none.

    Raises:
      UserError: frames that are phases, energies or views.
    """
    for keyword in VECTORS:
        values = header.get(keyword)
        count = len(set(values)) if isinstance(values, Sequence) else 1
        if count > 1 and keyword != "SliceVector":
            raise UserError(
                f"{header.file}: its {header.frame_count} frames differ in {keyword} ({count} "
                "values); save each volume as a file of its own"
            )
    if position is None or axes is None:
        return [None] * header.frame_count, ()
    offsets, notes = numbers(header.get("GridFrameOffsetVector"), header.frame_count), ()
    step = numbers([header.get("SpacingBetweenSlices")], 1)
    if offsets is None and step and step[0] and header.get("Modality") in ("NM", "PT"):
        ranks = numbers(header.get("SliceVector"), header.frame_count)
        offsets = tuple(step[0] * rank for rank in ranks or range(header.frame_count))
        notes = ("Its frames state one position; they are SpacingBetweenSlices apart from it on.",)
    if offsets is None:
        return [None] * header.frame_count, ()
    normal = np.cross(axes[:3], axes[3:])
    steps = np.array(offsets) - min(offsets) if notes else np.array(offsets) - offsets[0]
    return [tuple((np.array(position) + along * normal).tolist()) for along in steps], notes


def _scaling(header: Header, slope: Any, intercept: Any) -> tuple[float, float]:
    if slope in (None, "") and header.get("DoseGridScaling") is not None:
        slope = header.get("DoseGridScaling")
    try:
        pair = (float(slope or 1) if slope != 0 else 0.0, float(intercept or 0))
    except (TypeError, ValueError):
        pair = (math.nan, 0.0)
    if not all(map(math.isfinite, pair)) or pair[0] == 0:
        raise UserError(
            f"{header.file}: its RescaleSlope is {slope} and its RescaleIntercept {intercept}; "
            f"{EXPORT}"
        )
    return pair


def _plane_spacing(header: Header) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    """Returns mm between rows and between columns, and notes on where they are from."""
    spacing = _pixel_spacing(header.get("PixelSpacing"))
    at_detector = _pixel_spacing(
        header.get("ImagerPixelSpacing", header.get("NominalScannedPixelSpacing"))
    )
    if at_detector and spacing in (None, at_detector):
        return at_detector, (
            "The pixel spacing is that at the detector or film; objects are smaller than it says, "
            "by the radiographic magnification.",
        )
    if spacing:
        return spacing, ()
    return _ultrasound_spacing(header.get("SequenceOfUltrasoundRegions") or ())


def _ultrasound_spacing(regions: Iterable[Any]) -> tuple[tuple | None, tuple[str, ...]]:
    found = set()
    for region in regions:
        units = [region.get(f"PhysicalUnits{side}Direction") for side in "YX"]
        deltas = [region.get(f"PhysicalDelta{side}") for side in "YX"]
        if region.get("RegionSpatialFormat") == 1 and units == [_CM, _CM] and all(deltas):
            found.add(tuple(10 * abs(float(delta)) for delta in deltas))
    if len(found) > 1:
        return None, ("Its ultrasound regions have different spacings; lengths are in pixels.",)
    return _pixel_spacing(list(found.pop())) if found else None, ()


def _pixel_spacing(value: Any) -> tuple[float, float] | None:
    spacing = numbers(value, 2)
    return spacing if spacing and min(spacing) > 0 else None


def numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Returns the finite numbers of a tag; None if it is missing or has another count."""
    if value is None or isinstance(value, str | int | float) or not isinstance(value, Sequence):
        return None
    if len(value) != count or any(part is None for part in value):
        return None
    found = tuple(float(part) for part in value)
    return found if all(math.isfinite(part) for part in found) else None
