"""The manifest: reading and writing it, splits, and the identity of a case."""

import numpy as np
import pytest

from medsam_jax.data import manifest
from medsam_jax.data.splits import split_of
from medsam_jax.errors import UserError
from tests.datasets.scans import write_manifest


def test_split_is_80_10_10_and_stable():
    names = [f"case{number}" for number in range(20000)]
    found = [split_of("liver", name) for name in names]
    shares = [found.count(split) / len(names) for split in manifest.SPLITS]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.01)
    assert found[:5] == [split_of("liver", name) for name in names[:5]]
    assert found != [split_of("spleen", name) for name in names]
    assert found != [split_of("liver", name, seed=1) for name in names]


def test_adding_cases_moves_nobody_and_patients_stay_together(tmp_path):
    rows = [(f"p{n}", "i", "m", modality, "t") for n in range(60) for modality in ("CT", "MR")]
    header = "case_id,image,mask,modality,task"
    few, problems = manifest.read_manifest(
        write_manifest(tmp_path / "a.csv", rows[:40], header), "d"
    )
    many, _ = manifest.read_manifest(write_manifest(tmp_path / "b.csv", rows[::-1], header), "d")
    assert not problems
    before = {case.key: case.split for case in few}
    after = {case.key: case.split for case in many}
    assert all(after[key] == split for key, split in before.items())
    by_patient = {}
    for case in many:
        by_patient.setdefault(case.case_id, set()).add(case.split)
    assert all(len(splits) == 1 for splits in by_patient.values())


def test_the_split_column_wins_for_all_rows_of_a_case(tmp_path):
    rows = [("p", "i", "m", "CT", "t", "tune"), ("p", "i", "m", "MR", "t", "")]
    found, _ = manifest.read_manifest(write_manifest(tmp_path / "a.csv", rows), "d")
    assert [case.split for case in found] == ["tune", "tune"]


def test_a_spreadsheets_csv_is_read(tmp_path):
    text = '\ufeffcase_id, image,mask,modality,task\r\n"a,1",i.nii,m.nii,CT,"t"\r\n\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    (found,), problems = manifest.read_manifest(tmp_path / "a.csv", "d")
    assert not problems
    assert (found.row, found.case_id, found.image) == (2, "a,1", str(tmp_path / "i.nii"))


def test_masks_of_further_annotators_are_known_columns(tmp_path):
    header = "case_id,image,mask,modality,task,mask_b,mask_c d"
    path = write_manifest(tmp_path / "a.csv", [("p", "i", "m", "CT", "t", "b", "")], header)
    (found,), problems = manifest.read_manifest(path, "d")
    assert not problems
    assert found.masks == {"mask": str(tmp_path / "m"), "b": str(tmp_path / "b")}
    assert manifest.annotator_columns(path) == ["mask_b", "mask_c d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such manifest"),
        (b"", "has no cases"),
        (b"case_id,image,mask,modality,task\n", "has no cases"),
        (b"case_id,image,mask,modality\na,b,c,d\n", r"missing \['task'\]"),
        (b"case_id,image,mask,modality,task,organ\na,b,c,d,e,f\n", r"unknown \['organ'\]"),
        (b"case_id,image,mask,modality,task,task\na,b,c,d,e,f\n", r"repeated \['task'\]"),
        (b"case_id,image,mask,modality,task\na,b\xe9,c,d,e\n", r"not UTF-8 \(line 2, byte 0xe9\)"),
        (b'case_id,image,mask,modality,task\n"a"b,c,d,e,f\n', "row 2 is no CSV"),
    ],
)
def test_unusable_manifests(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        manifest.read_manifest(tmp_path / "a.csv", "d")
    assert str(error.value).startswith(str(tmp_path / "a.csv"))
    assert "\n" not in str(error.value)


def test_window_and_spaces(tmp_path):
    header = "case_id , image,mask,modality,task, split, window"
    rows = [(" p ", " i.nii", "m.nii ", "CT", "t", " tune ", " lung"), ("q", *"imCt", "", " ")]
    (one, two), problems = manifest.read_manifest(write_manifest(tmp_path / "a.csv", rows, header))
    assert not problems
    assert (one.case_id, one.split, one.window) == ("p", "tune", "lung")
    assert (one.image, one.mask) == (str(tmp_path / "i.nii"), str(tmp_path / "m.nii"))
    assert two.window is None


HEADER = "case_id,image,mask,modality,task"


def touched(tmp_path, rows, header=HEADER):
    """A manifest whose image and mask files exist."""
    for name in ("i", "m"):
        (tmp_path / name).touch()
    return write_manifest(tmp_path / "cases.csv", rows, header)


def test_cases_of_a_split_are_those_of_the_hash(tmp_path):
    names = [f"p{n}" for n in range(60)]
    path = touched(tmp_path, [(name, "i", "m", "CT", "t") for name in names])
    every = manifest.read_cases(path)
    assert [case.case_id for case in every] == names
    for split in manifest.SPLITS:
        found = [case.case_id for case in manifest.read_cases(path, split)]
        assert found == [n for n in names if split_of("medical_slices", n) == split]
    other = [case.case_id for case in manifest.read_cases(path, "tune", "liver")]
    assert other == [n for n in names if split_of("liver", n) == "tune"]
    counts = [len(manifest.read_cases(path, split)) for split in manifest.SPLITS]
    text = f"{counts[0]} train, {counts[1]} tune, {counts[2]} validation"
    assert manifest.count_splits(every) == text


def test_only_files_of_the_chosen_split_must_exist(tmp_path):
    rows = [("a", "i", "m", "CT", "t", "tune"), ("b", "gone", "m", "CT", "t", "train")]
    path = touched(tmp_path, rows, HEADER + ",split")
    (found,) = manifest.read_cases(path, "tune")
    assert found.case_id == "a"
    with pytest.raises(UserError, match="row 3: .*gone does not exist"):
        manifest.read_cases(path)
    with pytest.raises(UserError, match="no case of split validation, it has 1 train, 1 tune"):
        manifest.read_cases(path, "validation")
    with pytest.raises(UserError, match="--split: 'test' given; use one of train"):
        manifest.read_cases(path, "test")


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        ([["a", "x.nii", "y.nii", "CT", "t"]], "", "row 2: .*x.nii does not exist"),
        ([["a", "", "y.nii", "CT", "t"]], "", "row 2: image is empty"),
        ([["a", "i", "m", "CT", "t"]] * 2, "", r"row 3 \(case a\): .* repeat row 2"),
        ([["a", "i", "m", "CT", "t", "z"]], ",split", "row 2: split 'z'; use one of train"),
        ([["a", "i", "m", "CT", "t", "z"]], ",mask_r", "row 2: .*z does not exist"),
        ([["a", "i", "m", "CT", "t", "z"]], ",mask_mask", "column 'mask_mask' names no other"),
        ([["a", "i", "m", "CT", "t", "z"]], ",mask_", "column 'mask_' names no other"),
    ],
)
def test_cases_with_a_defect_are_refused(tmp_path, rows, extra, message):
    with pytest.raises(UserError, match=message):
        manifest.read_cases(touched(tmp_path, rows, HEADER + extra))


def test_rows_are_written_as_they_are_read(tmp_path):
    header = HEADER + ",split,window,mask_b"
    rows = [("p, 1", "i", "m", "CT", "t", "tune", "lung", "m"), ("q", *"imMt", "train", "", "")]
    before = manifest.read_cases(touched(tmp_path, rows, header))
    manifest.write_manifest(tmp_path / "again.csv", [case.to_row() for case in before])
    assert manifest.read_cases(tmp_path / "again.csv") == before
    assert [len(case.masks) for case in before] == [2, 1]


@pytest.mark.parametrize(
    "text",
    [
        "case_id;image;mask;modality;task\r\np;a, b.nii;m;CT ;t\r\n;;;;\r\n",
        "\ufeffcase_id;image;mask;modality;task\np;a, b.nii; m ;CT;t\n",
        "sep=;\r\ncase_id;image;mask;modality;task\r\np;a, b.nii;m;CT;t\r\n",
        "case_id\timage\tmask\tmodality\ttask\np\ta, b.nii\tm\tCT\tt\n",
        'case_id, image, mask, modality, task\n\np,"a, b.nii",m,\u00a0CT,t\n,,,,\n',
        'case_id,image,mask,modality,task\rp,"a, b.nii",m,CT,t\r',
    ],
)
def test_what_spreadsheets_write(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    (found,), problems = manifest.read_manifest(tmp_path / "a.csv")
    assert not problems
    assert (found.case_id, found.modality, found.task) == ("p", "CT", "t")
    assert (found.image, found.mask) == (str(tmp_path / "a, b.nii"), str(tmp_path / "m"))


@pytest.mark.parametrize(
    "name", ["a#b", "a[1]*?", "n\nl", "a\u2028b\x85c", "\u00e9", '"q"', "{x}; y"]
)
def test_any_name_is_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / name).touch()
    rows = [("p", f"{name}/{name}", f"{name}/{name}", "CT", "t")]
    path = write_manifest(tmp_path / "cases.csv", rows, HEADER)
    (case,) = manifest.read_cases(path)
    assert case.image == str(tmp_path / name / name)
    manifest.write_manifest(tmp_path / "again.csv", [case.to_row()])
    assert manifest.read_cases(tmp_path / "again.csv") == [case]


def test_ignored_labels(tmp_path):
    rows = [("p", "i", "m", "CT", "t", "2 5"), ("q", "i", "m", "CT", "t", "")]
    path = touched(tmp_path, rows, HEADER + ",ignore")
    before = manifest.read_cases(path)
    assert [case.ignore for case in before] == [(2, 5), ()]
    manifest.write_manifest(tmp_path / "again.csv", [case.to_row() for case in before])
    assert manifest.read_cases(tmp_path / "again.csv") == before
    for wrong in ("x", "0", "-1", "1.5"):
        path = touched(tmp_path, [("p", "i", "m", "CT", "t", wrong)], HEADER + ",ignore")
        with pytest.raises(UserError, match=f"row 2: ignore '{wrong}'; give label numbers above 0"):
            manifest.read_cases(path)
