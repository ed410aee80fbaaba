"""Masks land on the input in the patient: oblique, flipped, anisotropic, sagittal; DICOM SEG."""

import json
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medsam_jax.errors import UserError
from medsam_jax.inference.dicom_seg import write_dicom_seg
from medsam_jax.inference.predict_file import Request
from medsam_jax.inference.predict_folder import predict_path
from medsam_jax.io.scans import read_scan
from tests.io.dicom_files import write_slice

SHAPE = (9, 24, 32)


def rotation(angle: float, axis: int) -> np.ndarray:
    turn = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


GEOMETRIES = {
    "plain": (np.eye(3), (1.0, 1.0, 1.0)),
    "anisotropic": (np.eye(3), (0.7, 0.9, 4.0)),
    "flipped": (np.diag([-1.0, 1.0, -1.0]), (0.8, 0.8, 3.0)),
    "oblique": (rotation(0.4, 0) @ rotation(-0.7, 2), (0.6, 0.8, 2.5)),
    "sagittal": (np.eye(3)[[2, 0, 1]], (0.9, 0.9, 3.0)),
    "slices_along_x": (rotation(0.3, 1), (5.0, 0.8, 0.8)),
}


def objects() -> np.ndarray:
    """Two bright blocks, lopsided so that no flip or transposition leaves them in place."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 3:9, 4:15] = 3
    labels[4:8, 14:22, 20:25] = 7
    return labels


def image_of(array: np.ndarray, name: str) -> sitk.Image:
    direction, spacing = GEOMETRIES[name]
    image = sitk.GetImageFromArray(array)
    image.SetDirection(direction.ravel())
    image.SetSpacing(spacing)
    image.SetOrigin((-31.5, 12.25, 140.0))
    return image


def centroids(image: sitk.Image) -> dict[int, tuple[float, ...]]:
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(image)
    return {label: shapes.GetCentroid(label) for label in shapes.GetLabels()}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_masks_land_on_the_objects(bright, tmp_path, name, suffix):
    """The prompts are a mask on a grid of its own, flipped in all directions."""
    labels = objects()
    image = image_of(np.where(labels, 1000, 0).astype(np.int16) + 1, name)
    sitk.WriteImage(image, str(tmp_path / f"scan.{suffix}"))
    truth = image_of(labels, name)
    sitk.WriteImage(truth[::-1, ::-1, ::-1], str(tmp_path / "rough.mha"))
    request = Request(
        "m",
        str(tmp_path / f"scan.{suffix}"),
        tmp_path / "out",
        prompt_mask=str(tmp_path / "rough.mha"),
        modality="MR",
        follow="off",
    )
    predict_path(request)
    mask = sitk.ReadImage(str(tmp_path / "out" / f"scan_mask.{suffix}"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), labels)
    found, expected = centroids(mask), centroids(truth)
    assert found.keys() == expected.keys() == {3, 7}
    for label, centre in expected.items():
        np.testing.assert_allclose(found[label], centre, atol=1e-3)
    record = json.loads((tmp_path / "out" / "scan.json").read_text())
    volumes = {o["label"]: o["volume_ml"] for o in record["objects"]}
    voxel = np.prod(GEOMETRIES[name][1]) / 1000
    assert volumes == pytest.approx({3: 4 * 6 * 11 * voxel, 7: 4 * 8 * 5 * voxel}, rel=1e-4)


def write_series(folder, array: np.ndarray, orientation: np.ndarray, spacing) -> None:
    """A CT series: columns of `orientation` are the directions of x, y and of the slices."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index, plane in enumerate(array):
        place = np.array([-31.5, 12.25, 140.0]) + orientation[:, 2] * spacing[2] * index
        tags = {
            "0008|0005": "ISO_IR 100",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.3.4.{index + 1}",
            "0008|0020": "20200101",
            "0008|0030": "120000",
            "0008|0060": "CT",
            "0010|0010": "Test^Case",
            "0010|0020": "p1",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0020|0013": str(index),
            "0020|0032": "\\".join(f"{v:.6f}" for v in place),
            "0020|0037": "\\".join(f"{v:.8f}" for v in orientation[:, :2].T.ravel()),
            "0020|0052": "1.2.3.5",
            "0018|0050": str(spacing[2]),
        }
        image = sitk.GetImageFromArray(plane[None])  # ITK takes a flat image's spacing to be 1
        image.SetSpacing(spacing)
        image.SetOrigin(place)
        image.SetDirection(orientation.ravel())
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        # Named so that their order on disk is not the slices'.
        writer.SetFileName(str(folder / f"{(index * 5) % len(array)}.dcm"))
        writer.Execute(image)


@pytest.mark.parametrize("name", ["anisotropic", "oblique", "flipped"])
def test_dicom_seg_reads_back_the_same_voxels(bright, tmp_path, name):
    highdicom = pytest.importorskip("highdicom", reason="extra dicom is not installed")
    orientation, spacing = GEOMETRIES[name]
    turned = orientation * np.array([1, 1, np.linalg.det(orientation)])  # right-handed
    labels = objects()
    write_series(tmp_path / "ct", np.where(labels, 900, -400).astype(np.int16), turned, spacing)
    scan = read_scan(tmp_path / "ct")
    bright_voxels = scan.array > 0
    prompts = [  # on both ends of each block: between them nothing tapers
        {"label": 3, "name": "liver", "slice": 2, "box": [3, 2, 16, 10]},
        {"label": 3, "name": "liver", "slice": 5, "box": [3, 2, 16, 10]},
        {"label": 7, "slice": 4, "box": [18, 12, 26, 23]},
        {"label": 7, "slice": 7, "box": [18, 12, 26, 23]},
    ]
    (tmp_path / "prompts.json").write_text(json.dumps({"ct": prompts}))
    predict_path(
        Request("m", str(tmp_path / "ct"), tmp_path / "out", prompts=str(tmp_path / "prompts.json"))
    )
    seg = highdicom.seg.segread(tmp_path / "out" / "ct_mask.dcm")
    assert [seg.get_segment_description(i).segment_label for i in (1, 2)] == ["liver", "object 7"]
    volume = seg.get_volume(combine_segments=True)
    segments = np.zeros(SHAPE, int)
    for z, y, x in np.argwhere(volume.array > 0):
        # In the patient, by highdicom's affine; back to the scan's voxels, by SimpleITK's.
        place = (volume.affine @ [z, y, x, 1])[:3]
        index = scan.to_image(segments).TransformPhysicalPointToIndex(place)
        segments[index[::-1]] = volume.array[z, y, x]
    np.testing.assert_array_equal(segments > 0, bright_voxels)
    np.testing.assert_array_equal(np.unique(segments), [0, 1, 2])
    record = json.loads((tmp_path / "out" / "ct.json").read_text())
    assert record["modality"] == "CT"  # from the files
    assert [o["voxels"] for o in record["objects"]] == [4 * 6 * 11, 4 * 8 * 5]


def test_names_in_a_dicom_seg_of_prompts_stay(bright, tmp_path):
    highdicom = pytest.importorskip("highdicom", reason="extra dicom is not installed")
    labels = objects()
    orientation, spacing = GEOMETRIES["anisotropic"]
    write_series(
        tmp_path / "ct", np.where(labels, 900, -400).astype(np.int16), orientation, spacing
    )
    files = sorted(str(path) for path in (tmp_path / "ct").iterdir())
    files.sort(key=lambda path: int(pydicom.dcmread(path).InstanceNumber))
    numbers = np.array([0, 0, 0, 1, 0, 0, 0, 2])[labels]
    write_dicom_seg(tmp_path / "rough.dcm", numbers, files, {1: "left kidney", 2: "cyst"}, "m")
    for flags, second in (([], "cyst"), (["2=tumour"], "tumour")):
        output = tmp_path / second
        predict_path(
            Request(
                *("m", str(tmp_path / "ct"), output),
                prompt_mask=str(tmp_path / "rough.dcm"),
                label_names=flags,
                follow="off",
            )
        )
        record = json.loads((output / "ct.json").read_text())
        assert [found["name"] for found in record["objects"]] == ["left kidney", second]
        seg = highdicom.seg.segread(output / "ct_mask.dcm")
        names = [seg.get_segment_description(number).segment_label for number in (1, 2)]
        assert names == ["left kidney", second]


def test_dicom_without_highdicom(bright, tmp_path, monkeypatch):
    write_series(tmp_path / "ct", np.zeros(SHAPE, np.int16), np.eye(3), (1.0, 1.0, 2.0))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    request = {"boxes": [[3, 2, 16, 10]], "slice_index": 3}
    with pytest.raises(UserError, match="pip install 'medsam-jax.dicom.', or .*--mask_format"):
        predict_path(Request("m", str(tmp_path / "ct"), tmp_path / "out", **request))
    assert not (tmp_path / "out").exists()
    predict_path(
        Request("m", str(tmp_path / "ct"), tmp_path / "out", **request, mask_format="nii.gz")
    )
    assert (tmp_path / "out" / "ct_mask.nii.gz").exists()


def test_frames_without_positions_need_another_format(bright, tmp_path):
    gone = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient"))
    cine = write_slice(tmp_path / "cine.dcm", np.zeros(SHAPE, np.int16), tags=gone)
    request = {"boxes": [[3, 2, 16, 10]], "slice_index": 3}
    with pytest.raises(UserError, match="cine.dcm: its frames state no positions.*--mask_format"):
        predict_path(Request("m", str(cine), tmp_path / "out", **request))
    assert not (tmp_path / "out").exists()
