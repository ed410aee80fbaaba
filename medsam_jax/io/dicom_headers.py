"""Reads the headers of DICOM files with pydicom, and checks that their pixels are whole."""

import contextlib
import dataclasses
import io
import logging
import os
import struct
import warnings
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
KEYWORDS = (
    *(
        "TransferSyntaxUID",
        "MediaStorageSOPClassUID",
        "SOPClassUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "Modality",
    ),
    *("ImageType", "InstanceNumber", "SeriesDescription", "FrameOfReferenceUID"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "PixelPaddingValue"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("SliceThickness", "SpacingBetweenSlices", "GridFrameOffsetVector", "DoseGridScaling"),
    *("SequenceOfUltrasoundRegions", "EstimatedRadiographicMagnificationFactor"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("SegmentationType", "MaximumFractionalValue", "ReferencedSeriesSequence"),
)
# Tags by which several slices at one position may differ, the most telling first.
TELLING = (
    *("TemporalPositionIdentifier", "TriggerTime", "NominalCardiacTriggerDelayTime"),
    *("DiffusionBValue", "EchoTime", "EchoNumbers", "InversionTime", "RepetitionTime", "FlipAngle"),
    *("FrameReferenceTime", "ImageType", "ConvolutionKernel", "AcquisitionNumber"),
    *("AcquisitionTime", "ContentTime", "StackID", "InstanceNumber"),
)


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a DICOM file.

    values: by keyword, as pydicom returns them; only those of `KEYWORDS` and `TELLING`.
    pixels: keyword of the element that holds the pixels, "" without one.
    start, length: of its content in the file; -1 as length of encapsulated (compressed) pixels.
    """

    file: str
    values: dict[str, Any]
    pixels: str
    start: int
    length: int
    notes: tuple[str, ...] = ()

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
    except (
        Exception
    ) as error:  # pydicom has many kinds: KeyError, struct.error, RecursionError, ...
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
    import pydicom

    with reading(file), _Bounded(io.FileIO(file)) as opened:
        has_preamble = opened.read(132)[128:] == b"DICM"
        opened.seek(0)
        dataset = pydicom.dcmread(
            opened, stop_before_pixels=True, force=True, specific_tags=[*KEYWORDS, *TELLING]
        )
        values = {}
        for part in (getattr(dataset, "file_meta", None) or {}, dataset):
            for element in part:
                if element.keyword in _WANTED:
                    values[element.keyword] = element.value
        pixels, start, length = _pixel_element(opened, dataset, values)
    notes = () if has_preamble else ("The DICOM file has no preamble; it was read without.",)
    return Header(str(file), values, pixels, start, length, notes)


_WANTED = frozenset((*KEYWORDS, *TELLING))


def _pixel_element(opened: io.BufferedReader, dataset: Any, values: dict) -> tuple[str, int, int]:
    """Returns keyword, start and length of the element at which pydicom stopped."""
    if str(values.get("TransferSyntaxUID", "")) == "1.2.840.10008.1.2.1.99":
        return ("PixelData" if "Rows" in values else "", 0, 0)  # deflated: pydicom read it all
    is_implicit, is_little = dataset.original_encoding
    order = "<" if is_little else ">"
    head = opened.read(12)
    if len(head) < 8:
        return "", 0, 0
    group, element = struct.unpack(f"{order}HH", head[:4])
    pixels = _PIXELS.get(group << 16 | element, "")
    if not pixels:
        return "", 0, 0
    at, length = opened.tell() - len(head), head[4:8]
    if is_implicit:
        start = at + 8
    else:
        start, length = at + 12, head[8:12].ljust(4, b"\0")
    length = struct.unpack(f"{order}I", length)[0]
    return pixels, start, -1 if length == 0xFFFFFFFF else length
