"""Tells DICOM images from other DICOM objects, and says for each of those what to do."""

from medsam_jax.io.dicom_headers import EXPORT, Header

DIRECTORY = "1.2.840.10008.1.3.10"
SEGMENTATIONS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "binary",
    "1.2.840.10008.5.1.4.1.1.66.7": "label map",
}
_NO_IMAGES = ("Directory", "Document", "SR Storage", "Report", "Presentation", "Waveform", "PDF")
_NO_IMAGES += ("CDA", "STL", "OBJ", "MTL", "Structure Set", "RT Plan", "Treatment", "Raw Data")
_NO_IMAGES += (
    "Registration",
    "Fiducials",
    "Spectroscopy",
    "Surface",
    "Tractography",
    "Log",
    "Plan",
)
_NO_IMAGES += (
    "Real World Value",
    "ECG",
    "Audio",
    "Measurements",
    "Protocol",
    "Beams",
    "Instruction",
)
_NO_IMAGES += ("RT Segment", "Radiation", "Physician Intent")


def kind(header: Header) -> str:
    """Returns the name of a file's class, such as "CT Image"; "" if it is not known."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    uid = str(header.get("SOPClassUID") or header.get("MediaStorageSOPClassUID") or "")
    name = UID(uid, validation_mode=IGNORE).name
    return "" if name == uid else name.replace(" Storage", "")


def is_segmentation(header: Header) -> bool:
    uid = header.get("SOPClassUID") or header.get("MediaStorageSOPClassUID")
    return str(uid) in SEGMENTATIONS


def is_other(header: Header) -> bool:
    """Returns whether a whole file of this class is no image."""
    name = kind(header)
    if "Image" in name or "Dose" in name or header.get("Rows") is not None:
        return False
    return any(word in f"{name} Storage" for word in _NO_IMAGES) and not header.pixels


def why_no_image(header: Header) -> str:
    """Returns why a file cannot be an image, and the remedy; "" for one that has pixels."""
    name = kind(header) or "file of an unknown class"
    if is_segmentation(header):
        return f"is a DICOM {name}, which is a mask; give the images as image and this as mask"
    if is_other(header):
        return f"is a DICOM {name}; {_remedy(name)}"
    if header.pixels and header.get("Rows") is not None:
        return ""
    if header.get("Rows") is not None or "Image" in name:
        return f"is a DICOM {name} without pixels: the file is cut, or a header alone; {EXPORT}"
    return f"is a damaged DICOM file, or has no image (its class: {name}); give the images"


def _remedy(name: str) -> str:
    if "Structure Set" in name:
        return (
            "it has contours, no voxels: convert them to a label map on the image (e.g. with 3D "
            "Slicer), or give the images that it refers to"
        )
    if "Directory" in name:
        return "give the folder of a series that it lists"
    return "it has no voxels; give the images that it refers to"
