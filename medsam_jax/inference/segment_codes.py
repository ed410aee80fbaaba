"""SNOMED CT codes of segments by the names of their labels, for DICOM SEG.

Names are pydicom's keywords of its SCT table. A name is known where all of its words are: a
structure ("left kidney", "urinary_bladder"), a finding ("tumour"), or a finding in a structure
("liver tumour 2").
"""

import re
from typing import Any, NamedTuple

STRUCTURES = {
    "adrenal gland": "AdrenalGland",
    "aorta": "Aorta",
    "bladder": "Bladder",
    "bone": "Bone",
    "brain": "Brain",
    "breast": "Breast",
    "colon": "Colon",
    "duodenum": "Duodenum",
    "esophagus": "Esophagus",
    "eye": "Eye",
    "femur": "Femur",
    "gall bladder": "Gallbladder",
    "gallbladder": "Gallbladder",
    "heart": "Heart",
    "hippocampus": "Hippocampus",
    "inferior vena cava": "InferiorVenaCava",
    "kidney": "Kidney",
    "left ventricle": "LeftVentricle",
    "liver": "Liver",
    "lung": "Lung",
    "lymph node": "LymphNode",
    "oesophagus": "Esophagus",
    "pancreas": "Pancreas",
    "portal vein": "PortalVein",
    "prostate": "Prostate",
    "rectum": "Rectum",
    "skin": "Skin",
    "small bowel": "SmallIntestine",
    "small intestine": "SmallIntestine",
    "spinal cord": "SpinalCord",
    "spleen": "Spleen",
    "stomach": "Stomach",
    "thyroid": "Thyroid",
    "trachea": "Trachea",
    "urinary bladder": "Bladder",
    "uterus": "Uterus",
    "vertebra": "Vertebra",
}
FINDINGS = {
    "cancer": "Neoplasm",
    "cyst": "Cyst",
    "edema": "Edema",
    "haematoma": "Hematoma",
    "haemorrhage": "Hemorrhage",
    "hematoma": "Hematoma",
    "hemorrhage": "Hemorrhage",
    "lesion": "Lesion",
    "necrosis": "Necrosis",
    "neoplasm": "Neoplasm",
    "nodule": "Nodule",
    "oedema": "Edema",
    "tumor": "Neoplasm",
    "tumour": "Neoplasm",
}
_SIDES = {"left": "Left", "right": "Right"}


class SegmentCodes(NamedTuple):
    """Codes of a segment (`pydicom.sr.coding.Code`)."""

    category: Any
    kind: Any
    region: Any = None  # the structure that a finding is in
    side: Any = None


def segment_codes(name: str) -> SegmentCodes:
    """Returns the codes of a label's name; of an unknown name, tissue without further detail."""
    from pydicom.sr.codedict import codes

    sct = codes.SCT
    words = re.findall(r"[^\W\d_]+", name.lower())
    words = [word.removesuffix("s") if word not in _WITH_S else word for word in words]
    *others, last = words or [""]
    if last in FINDINGS:
        region, side = _structure(others)
        if region or not others:
            return SegmentCodes(
                sct.MorphologicallyAbnormalStructure,
                getattr(sct, FINDINGS[last]),
                getattr(sct, region) if region else None,
                getattr(sct, side) if side else None,
            )
    structure, side = _structure(words)
    if not structure:
        return SegmentCodes(sct.Tissue, sct.Tissue)
    side = getattr(sct, side) if side else None
    return SegmentCodes(sct.AnatomicalStructure, getattr(sct, structure), None, side)


_WITH_S = {word for name in (*STRUCTURES, *FINDINGS) for word in name.split() if word[-1] == "s"}


def _structure(words: list[str]) -> tuple[str, str]:
    """Returns keywords of a structure and its side, "" where unknown or not named."""
    if structure := STRUCTURES.get(" ".join(words)):  # "left ventricle" is one
        return structure, ""
    sides = [word for word in words if word in _SIDES]
    rest = " ".join(word for word in words if word not in _SIDES)
    structure = STRUCTURES.get(rest, "") if len(sides) < 2 else ""
    return structure, _SIDES[sides[0]] if structure and sides else ""
