"""DICOM SEG: codes by label name, display colours, tracking ids."""

import highdicom as hd
import numpy as np
import pydicom
import pytest

from medsam_jax.drawing import OBJECTS
from medsam_jax.inference.dicom_seg import write_dicom_seg
from medsam_jax.inference.segment_codes import FINDINGS, STRUCTURES, segment_codes
from tests.io.test_dicom_seg import PATIENT
from tests.io.test_dicom_series import volume, write

ANATOMY, MORPHOLOGY, TISSUE = "91723000", "49755003", "85756007"


@pytest.mark.parametrize(
    ("name", "category", "kind", "region", "side"),
    [
        ("liver", ANATOMY, "10200004", None, None),
        ("Left Kidney", ANATOMY, "64033007", None, "7771000"),
        ("kidney_right", ANATOMY, "64033007", None, "24028007"),
        ("lungs", ANATOMY, "39607008", None, None),
        ("left ventricle", ANATOMY, "87878005", None, None),
        ("pancreas", ANATOMY, "15776009", None, None),
        ("tumour", MORPHOLOGY, "108369006", None, None),
        ("liver tumors", MORPHOLOGY, "108369006", "10200004", None),
        ("lesion 3", MORPHOLOGY, "52988006", None, None),
        ("left kidney cyst", MORPHOLOGY, "367643001", "64033007", "7771000"),
        ("object 7", TISSUE, TISSUE, None, None),
        ("not liver", TISSUE, TISSUE, None, None),
        ("liver vessels", TISSUE, TISSUE, None, None),
        ("lobe tumour", TISSUE, TISSUE, None, None),
        ("", TISSUE, TISSUE, None, None),
    ],
)
def test_codes_by_name(name, category, kind, region, side):
    found = segment_codes(name)
    assert [code and code.value for code in found] == [category, kind, region, side]


def test_every_name_of_the_table_has_a_code():
    for name in (*STRUCTURES, *FINDINGS):
        found = segment_codes(name)
        assert found.kind.scheme_designator == "SCT"
        assert found.kind.value != TISSUE, name


def test_the_file_holds_codes_colours_and_tracking(tmp_path):
    folder = write(tmp_path / "ct", volume(), tags=PATIENT)
    files = sorted(map(str, folder.iterdir()))
    labels = np.zeros((6, 16, 20), int)
    labels[1:3, 2:9, 3:12], labels[4, 5:12, 8:19], labels[5, :3, :3] = 1, 2, 9
    names = {1: "left kidney", 2: "liver tumour", 9: "thing"}
    write_dicom_seg(tmp_path / "s.dcm", labels, files, names, "m")
    write_dicom_seg(tmp_path / "again.dcm", labels, files, names, "m")
    first, again = (hd.seg.segread(tmp_path / name) for name in ("s.dcm", "again.dcm"))
    uids = [first.get_segment_description(number).tracking_uid for number in (1, 2, 3)]
    assert len(set(uids)) == 3
    assert uids == [again.get_segment_description(number).tracking_uid for number in (1, 2, 3)]
    kidney, tumour, thing = (first.get_segment_description(number) for number in (1, 2, 3))
    assert [one.tracking_id for one in (kidney, tumour, thing)] == [
        "1 left kidney",
        "2 liver tumour",
        "9 thing",
    ]
    types = [one.segmented_property_type.value for one in (kidney, tumour, thing)]
    assert types == ["64033007", "108369006", TISSUE]
    assert [region.value for region in tumour.anatomic_regions] == ["10200004"]
    item = pydicom.dcmread(tmp_path / "s.dcm").SegmentSequence[0]
    modifier = item.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert [one.CodeValue for one in modifier] == ["7771000"]
    for label, one in zip(names, (kidney, tumour, thing), strict=True):
        expected = hd.color.CIELabColor.from_rgb(*OBJECTS[(label - 1) % len(OBJECTS)])
        assert one.RecommendedDisplayCIELabValue == list(expected.value)
