"""Reads the headers of DICOM files with pydicom, and checks that their pixels are whole."""

import contextlib
import dataclasses
import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medsam_jax.errors import UserError

EXPORT = "export or copy it again"
_PIXELS = {
    0x7FE00010: "PixelData",
    0x7FE00008: "FloatPixelData",
    0x7FE00009: "DoubleFloatPixelData",
}
# Tags that tell frames of nuclear medicine apart; only slices form a volume.
VECTORS = ("SliceVector", "EnergyWindowVector", "DetectorVector", "PhaseVector", "RotationVector")
VECTORS += ("RRIntervalVector", "TimeSlotVector", "AngularViewVector", "TimeSliceVector")
KEYWORDS = (
    *VECTORS,
    *(
        "TransferSyntaxUID",
        "MediaStorageSOPClassUID",
        "SOPClassUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "Modality",
        "PatientID",
    ),
    *("ImageType", "InstanceNumber", "SeriesDescription", "FrameOfReferenceUID"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *(
        "RescaleSlope",
        "RescaleIntercept",
        "RescaleType",
        "Units",
        "ModalityLUTSequence",
        "PixelPaddingValue",
    ),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("NominalScannedPixelSpacing", "DetectorInformationSequence"),
    *(
        "PixelAspectRatio",
        "TotalPixelMatrixRows",
        "TotalPixelMatrixColumns",
        "SliceThickness",
        "SpacingBetweenSlices",
        "GridFrameOffsetVector",
        "DoseGridScaling",
    ),
    *("SequenceOfUltrasoundRegions", "EstimatedRadiographicMagnificationFactor"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("SegmentationType", "SegmentSequence", "MaximumFractionalValue"),
    "ReferencedSeriesSequence",
)
# Tags by which several slices at one position may differ, the most telling first.
TELLING = (
    *("TemporalPositionIdentifier", "TriggerTime", "NominalCardiacTriggerDelayTime"),
    *("DiffusionBValue", "EchoTime", "EchoNumbers", "InversionTime", "RepetitionTime", "FlipAngle"),
    *("FrameReferenceTime", "ImageType", "ConvolutionKernel", "AcquisitionNumber"),
    *("AcquisitionTime", "ContentTime", "StackID", "InstanceNumber"),
)
_META = 2048  # bytes that hold the file meta tags
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_EXPLICIT = b"1.2.840.10008.1.2.1"
_NEVER_DOUBTED = 16 << 20  # bytes that a deflated file may have


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a DICOM file.

    values: by keyword, as pydicom returns them; only those of `KEYWORDS` and `TELLING`.
    pixels: keyword of the element that holds the pixels, "" without one.
    start, length: of its content in the file; -1 as length of encapsulated (compressed) pixels.
    inflated: bytes that `start` refers to in place of the file, of a deflated file.
    """

    file: str
    values: dict[str, Any]
    pixels: str
    start: int
    length: int
    notes: tuple[str, ...] = ()
    inflated: bytes | None = None

    def get(self, keyword: str, default: Any = None) -> Any:
        value = self.values.get(keyword)
        return default if value is None or value == "" else value

    def integer(self, keyword: str, default: int = 0) -> int:
        return int(self.get(keyword, default))

    @property
    def name(self) -> str:
        return os.path.basename(self.file)

    @property
    def frame_count(self) -> int:
        return max(1, self.integer("NumberOfFrames", 1))

    @property
    def series(self) -> str:
        return str(self.get("SeriesInstanceUID", ""))

    @property
    def syntax(self) -> str:
        return str(self.get("TransferSyntaxUID", ""))

    @property
    def shape(self) -> tuple[int, int]:
        return self.integer("Rows"), self.integer("Columns")


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turns whatever pydicom raises for a damaged file into a `UserError`; hides its warnings."""
    import pydicom.config

    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or 'damaged'}); {EXPORT}"
        ) from None
    except Exception as error:  # pydicom raises KeyError, struct.error, RecursionError, ...
        kind = type(error).__name__
        raise UserError(f"{path}: is a damaged DICOM file ({kind}); {EXPORT}") from None
    finally:
        logger.disabled = was_disabled


class _Bounded(io.BufferedReader):
    """Reads no more than the file holds: a damaged length would be allocated first."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw)
        self._size = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def read_header(file: str | Path) -> Header:
    """Reads a file's header up to its pixels. Raises UserError for a damaged one."""
    with reading(file), _Bounded(io.FileIO(file)) as opened:
        has_preamble = opened.read(132)[128:] == b"DICM"
        opened.seek(0)
        inflated = _inflate(opened) if has_preamble else None
        source = opened if inflated is None else io.BytesIO(inflated)
        header = _parse(source, str(file))
    notes = () if has_preamble else ("The DICOM file has no preamble; it was read without.",)
    return dataclasses.replace(header, notes=notes, inflated=inflated)


def _parse(source: io.BufferedIOBase, file: str) -> Header:
    import pydicom
    from pydicom.datadict import keyword_for_tag

    dataset = pydicom.dcmread(
        source, stop_before_pixels=True, force=True, specific_tags=[*KEYWORDS, *TELLING]
    )
    values = {}
    for part in (getattr(dataset, "file_meta", None) or {}, dataset):
        for tag in list(part.keys()):
            keyword = keyword_for_tag(tag)
            if keyword in KEYWORDS:
                values[keyword] = part[tag].value
            elif keyword in TELLING:
                with contextlib.suppress(ValueError, TypeError, OverflowError):
                    values[keyword] = part[tag].value
    return Header(file, values, *_pixel_element(source, dataset))


def _inflate(opened: io.BufferedIOBase) -> bytes | None:
    """Returns the whole of a deflated file as one that is not; None for any other file."""
    head = opened.read(_META)
    opened.seek(0)
    at = head.find(_DEFLATED)
    if at < 0:
        return None
    content = opened.read()
    start = 144 + struct.unpack_from("<I", content, 140)[0]  # behind the group of file meta tags
    inflater = zlib.decompressobj(-15)
    limit = max(_NEVER_DOUBTED, 100 * len(content))
    data = inflater.decompress(content[start:], limit)
    if not inflater.eof:
        raise UserError(f"{opened.name}: its compressed content is cut; {EXPORT}")
    meta = content[:start].replace(_DEFLATED, _EXPLICIT.ljust(len(_DEFLATED), b"\0"))
    return meta + data


def _pixel_element(source: io.BufferedIOBase, dataset: Any) -> tuple[str, int, int]:
    """Returns keyword, start and length of the element at which pydicom stopped."""
    is_implicit, is_little = dataset.original_encoding
    order = "<" if is_little else ">"
    at = source.tell()
    head = source.read(12)
    if len(head) < 8:
        return "", 0, 0
    group, element = struct.unpack(f"{order}HH", head[:4])
    pixels = _PIXELS.get(group << 16 | element, "")
    if not pixels:
        return "", 0, 0
    has_type = head[4:6].isalpha() and head[4:6].isupper()  # some writers leave it out here
    start, length = (
        (8, head[4:8]) if is_implicit or not has_type else (12, head[8:].ljust(4, b"\0"))
    )
    length = struct.unpack(f"{order}I", length)[0]
    return pixels, at + start, -1 if length == 0xFFFFFFFF else length
