"""Masks of a DICOM series as a DICOM Segmentation object (binary, one segment a label)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

import medsam_jax
from medsam_jax.drawing import OBJECTS
from medsam_jax.errors import UserError
from medsam_jax.inference.segment_codes import segment_codes
from medsam_jax.io.dicom import frame_order


def require_highdicom() -> None:
    """Raises UserError, saying what to install, where `highdicom` is absent."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise UserError(
            "DICOM SEG: highdicom is not installed; pip install 'medsam-jax[dicom]', or choose "
            "another format, e.g. --mask_format nii.gz"
        ) from None


def write_dicom_seg(
    path: Path,
    labels: Int[np.ndarray, "z y x"],
    sources: Sequence[str],
    names: dict[int, str],
    checkpoint: str,
    prompted: bool = True,
) -> None:
    """Writes a label map that lies on the slices of a series, referring to them.

    Args:
      labels: 0 is background.
      sources: the series' files in the order of `labels`' first axis (or one multi-frame file).
      names: of each label. Segments are numbered from 1 in the order of labels, as DICOM requires.
      checkpoint: named as the algorithm's model.
      prompted: whether a person (semi-automatic) or nobody (automatic) said where the objects are.

    Raises:
      UserError: the series lacks what a SEG must refer to.
    """
    import highdicom as hd
    import pydicom

    if len(sources) == 1:  # highdicom counts frames as the file does
        labels = labels[np.argsort(frame_order(sources[0]))]
    series = [_with_identifiers(pydicom.dcmread(file, force=True)) for file in sources]
    present = sorted(names) or [1]  # a SEG has one segment at least; it may be empty
    numbers = np.zeros(max(int(labels.max(initial=0)), present[-1]) + 1, np.uint16)
    numbers[present] = np.arange(1, len(present) + 1)
    dtype = np.uint8 if len(present) < 256 else np.uint16
    descriptions = [
        _describe(number, label, names.get(label, f"label {label}"), prompted, series[0])
        for number, label in enumerate(present, start=1)
    ]
    try:
        segmentation = hd.seg.Segmentation(
            source_images=series,
            pixel_array=numbers[labels].astype(dtype),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=hd.UID(),
            series_number=100,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medsam_jax",
            manufacturer_model_name=Path(checkpoint).name[:64],
            software_versions=medsam_jax.__version__,
            device_serial_number="0",
            series_description=f"medsam_jax {Path(checkpoint).name}"[:64],
        )
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{sources[0]}: a DICOM SEG cannot refer to this series ({error}); choose another "
            "format, e.g. --mask_format nii.gz"
        ) from None
    segmentation.save_as(path)


def _with_identifiers(dataset):
    """Anonymisers blank class and instance; the file's own header still has them."""
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not dataset.get(keyword):
            setattr(dataset, keyword, dataset.file_meta.get(f"MediaStorage{keyword}"))
    return dataset


def _describe(number: int, label: int, name: str, prompted: bool, source: Any) -> Any:
    """Returns the description of a segment: codes by its name, the overlay's colour, tracking.

    The tracking UID is made of the series, label and name: a repeated segmentation has the same.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    kinds = hd.seg.SegmentAlgorithmTypeValues
    found = segment_codes(name)
    identity = [str(source.get("SeriesInstanceUID", "")), str(label), name]
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=found.category,
        segmented_property_type=found.kind,
        anatomic_regions=[found.region] if found.region else None,
        display_color=hd.color.CIELabColor.from_rgb(*OBJECTS[(label - 1) % len(OBJECTS)]),
        tracking_id=f"{label} {name}",
        tracking_uid=generate_uid(entropy_srcs=identity),
        algorithm_type=kinds.SEMIAUTOMATIC if prompted else kinds.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="medsam_jax",
            version=medsam_jax.__version__,
            family=codes.DCM.ArtificialIntelligence,
        ),
    )
    if found.side:
        coded = hd.sr.CodedConcept.from_code(found.side)
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [coded]
    return description
