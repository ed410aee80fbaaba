"""Tests of built data sets: equal to the source files, equal for any workers, safe to interrupt."""

import filecmp
import json
import multiprocessing
import pathlib
import pickle
import shutil
import sys
import tempfile
import time

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from datasets.medical_slices import building, card, metadata, slices
from datasets.medical_slices.medical_slices_dataset_builder import Plan
from medsam_jax.data import preprocess
from medsam_jax.data.datasets import find_dataset, open_dataset
from medsam_jax.data.manifest import REQUIRED, SPLITS, read_cases
from medsam_jax.data.recipes import RECIPES
from medsam_jax.data.splits import split_of
from medsam_jax.errors import OutputError, UserError
from tests.datasets.scans import SIDE, write_manifest

WRITE_CARD = card.write


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    """Drawing takes longer than building here; the session's data set has its card."""
    monkeypatch.setattr(building.card, "write", lambda *_: None)


def request(manifest, data_dir, recipe="lite", **settings):
    options = slices.Options(recipe=recipe, **settings.pop("options", {}))
    return building.Request(str(manifest), str(data_dir), options, **settings)


def records(data_dir, split):
    source, _ = open_dataset(data_dir, split)
    return [source[index] for index in range(len(source))]


def test_ct_slices_are_those_of_the_file(hospital, built):
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(hospital.parent / "ct2.nii.gz")))
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(hospital.parent / "ct2_mask.nii.gz")))
    found = records(built, "tune")
    assert [record["slice_index"] for record in found] == [2, 3, 4, 5, 6, 7]  # the last one too
    grey = np.floor((np.clip(array.astype(float), -500, 1000) + 500) / 1500 * 255 + 1e-6)
    for record in found:
        index = int(record["slice_index"])
        assert record["image"].shape == (256, 256, 3)
        assert record["mask"].shape == (256, 256, 1)
        expected, _ = preprocess.resize_image(grey[index].astype(np.uint8), RECIPES["lite"])
        np.testing.assert_array_equal(record["image"], expected)
        stored = labels[index].repeat(7, axis=0).repeat(7, axis=1)[:256, :256]  # 40 -> 256 is 6.4
        assert set(np.unique(record["mask"])) == {0, 1, 2} & {
            {0: 0, 1: 1, 300: 2}[label] for label in np.unique(stored).tolist()
        }
        assert (record["mask"][120, 60, 0]) == 0
        assert (record["mask"][int(10.5 * 6.4), int(12.5 * 6.4), 0]) == 1
        np.testing.assert_allclose(record["spacing"], [0.9 / 6.4, 0.8 / 6.4], rtol=1e-6)
        assert record["original_shape"].tolist() == [SIDE, SIDE]
        assert record["valid_shape"].tolist() == [256, 256]
        assert record["case_id"] == b"p2"
        assert record["task"] == b"organs"
        assert record["modality"] == b"CT"


def test_the_evaluation_of_the_manifest_sees_the_splits_of_the_build(hospital, tmp_path):
    """No row names a split: the hash of the data set's name and the case id decides."""
    names = {}
    for name in map("p{}".format, range(99)):
        names.setdefault(split_of("liver", name), name)
    rows = [(name, "us0.png", "us0_mask.png", "US", "mass") for name in names.values()]
    path = write_manifest(hospital.parent / "hash.csv", rows, ",".join(REQUIRED))
    building.build(request(path, tmp_path, name="liver"))
    built = {case["case_id"]: case["split"] for case in find_dataset(tmp_path).record["cases"]}
    for split in SPLITS:
        scored = [case.case_id for case in read_cases(path, split, "liver")]
        assert scored == [name for name, where in built.items() if where == split] == [names[split]]


def test_the_ct_windows_of_a_split(hospital, tmp_path):
    rows = [
        ("p0", "ct0.nii.gz", "ct0_mask.nii.gz", "CT", "organs", "train", "soft_tissue"),
        ("p1", "ct1.nii.gz", "ct1_mask.nii.gz", "CT", "organs", "train", "lung"),
        ("p2", "ct2.nii.gz", "ct2_mask.nii.gz", "CT", "bones", "train", ""),
        ("p4", "ct3.nii.gz", "ct3_mask.nii.gz", "CT", "bones", "train", "wide"),
        ("p3", "mr3.nrrd", "mr3_mask.nrrd", "MR", "tumour", "tune", ""),
    ]
    header = "case_id,image,mask,modality,task,split,window"
    manifest = write_manifest(hospital.parent / "windows.csv", rows, header)
    building.build(request(manifest, tmp_path))
    info = find_dataset(tmp_path)
    assert set(info.ct_windows("train")) == {"soft_tissue", "lung", "wide"}
    assert info.ct_windows("train")[0] == "wide", "of two scans"
    assert info.ct_windows("train", "bones") == ("wide",)
    assert info.ct_windows("tune") == ()


def test_slices_follow_the_thick_axis_with_row_and_column_spacing(hospital, built):
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(hospital.parent / "mr3.nrrd")))
    found = [record for record in records(built, "validation") if record["modality"] == b"MR"]
    assert len(found) == array.shape[2]
    limits = preprocess.intensity_limits(array, "MR", RECIPES["lite"])
    for record in found:
        plane = array[:, :, int(record["slice_index"])]  # rows are z (0.7), columns y (1.1)
        grey = preprocess.normalise_intensity(plane, "MR", RECIPES["lite"], limits=limits)
        expected, _ = preprocess.resize_image(grey, RECIPES["lite"])
        np.testing.assert_array_equal(record["image"], expected)
        np.testing.assert_allclose(record["spacing"], [0.7 / 6.4, 1.1 / 6.4], rtol=1e-6)


def test_pictures_keep_their_colours_and_their_padding(hospital, built):
    found = [record for record in records(built, "train") if record["modality"] == b"US"]
    assert [record["case_id"] for record in found] == [b"u0", b"u1"]
    for record, name in zip(found, ("us0.png", "us1.png"), strict=True):
        with Image.open(hospital.parent / name) as file:
            picture = np.asarray(file)
        expected, valid_shape = preprocess.resize_image(picture, RECIPES["lite"])
        np.testing.assert_array_equal(record["image"], expected)
        assert record["valid_shape"].tolist() == list(valid_shape) == [171, 256]
        assert not record["image"][171:].any()
        assert np.isnan(record["spacing"]).all()


def test_the_record_says_what_was_done(built):
    info = find_dataset(built)
    record = info.record
    assert info.recipe == "lite"
    assert record["recipe_fields"]["percentiles"] == [0.5, 99.5]
    assert record["tool_versions"]["numpy"] == np.__version__
    assert record["splits"]["train"]["by_task_and_modality"] == {
        "mass | US": {"cases": 2, "objects": 2, "slices": 2},
        "organs | CT": {"cases": 2, "objects": 18, "slices": 12},
        "tumour | MR": {"cases": 1, "objects": 9, "slices": 9},
    }
    assert record["splits"]["train"]["cases"] == 4  # p0 counts once
    assert record["splits"]["validation"]["slices"] == 6 + 9  # p3's MR follows its CT
    assert record["dropped"]["slices without a label"] == 4 * 2
    assert record["labels"]["organs"] == {
        "1": {"name": "1", "original": 1},
        "2": {"name": "300", "original": 300},  # ids above a byte are renumbered
    }
    for split, counts in info.counts.items():
        found = [len(np.unique(r["mask"])) - 1 for r in records(built, split)]
        assert (len(found), sum(found)) == (counts["slices"], counts["objects"])


def test_the_card_is_beside_the_data(built):
    directory = find_dataset(built).directory
    card = (directory / "README.md").read_text()
    assert "| **train** | all | 4 | 23 | 29 |" in card
    assert "| slices without a label | 8 |" in card
    for name in ("samples", "object_sizes", "spacings", "intensities"):
        with Image.open(directory / "figures" / f"{name}.png") as figure:
            assert figure.size[0] > 300


def test_two_workers_write_the_same_bytes(hospital, built, tmp_path):
    building.build(request(hospital, tmp_path, num_workers=2))
    first, second = find_dataset(built).directory, find_dataset(tmp_path).directory
    names = sorted(path.name for path in second.iterdir())
    assert len(names) == 3 + 3 + 4  # shards, object indices, three descriptions, the manifest
    assert filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def test_shards_split_a_large_set_in_manifest_order(hospital, tmp_path, monkeypatch):
    from datasets.medical_slices import medical_slices_dataset_builder

    monkeypatch.setattr(medical_slices_dataset_builder, "SHARD_BYTES", 1)
    building.build(request(hospital, tmp_path))
    shards = sorted(find_dataset(tmp_path).directory.glob("*train.array_record*"))
    assert len(shards) == 5
    assert [r["case_id"] for r in records(tmp_path, "train")][::6] == [b"p0", b"p1", b"p0", b"p0"]


def test_labels_are_chosen_and_named(hospital, tmp_path):
    options = {"labels": slices.parse_labels("organs:300=liver, 1=lesion")}
    building.build(request(hospital, tmp_path, options=options))
    record = find_dataset(tmp_path).record
    assert record["labels"]["organs"] == {
        "1": {"name": "lesion", "original": 1},
        "2": {"name": "liver", "original": 300},
    }
    with pytest.raises(UserError, match=r"no mask has the labels \[4\]"):
        building.build(
            request(hospital, tmp_path / "2", options={"labels": slices.parse_labels("4=x,1")})
        )


def test_one_label_becomes_instances(hospital, tmp_path):
    options = {"labels": slices.parse_labels("mass:1=mass"), "instances": 1}
    building.build(request(hospital, tmp_path, options=options))
    record = find_dataset(tmp_path).record
    assert record["labels"]["mass"]["above"] == {"instances_of": 1}
    assert record["splits"]["train"]["objects"] == 4  # two blobs in each of two pictures
    for stored in records(tmp_path, "train"):
        mask = stored["mask"][:, :, 0]
        assert np.unique(mask).tolist() == [0, 2, 3]
        assert np.unique(mask[: int(30 * 256 / 90)]).tolist() == [0, 2]


def test_an_axis_can_be_chosen(hospital, tmp_path):
    building.build(request(hospital, tmp_path, options={"axis": 1, "labels": (("organs", 1, ""),)}))
    found = records(tmp_path, "tune")
    assert [record["slice_index"] for record in found] == list(range(5, 17))
    assert found[0]["original_shape"].tolist() == [8, SIDE]


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_the_other_recipes_build(hospital, tmp_path, recipe):
    building.build(request(hospital, tmp_path, recipe))
    size = RECIPES[recipe].size
    found = records(tmp_path, "tune")
    assert found[0]["image"].shape == (size, size, 3)
    for record in found:
        pixels = np.bincount(record["mask"].ravel())[1:]
        assert (pixels[pixels > 0] > RECIPES[recipe].min_pixels).all()


def test_a_finished_data_set_is_not_overwritten(hospital, built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    with pytest.raises(UserError, match="finished data set and is not overwritten"):
        building.build(request(hospital, built))
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def _build_slowly(manifest, data_dir, reached):
    from datasets.medical_slices import card

    def wait(*_):
        reached.set()
        time.sleep(60)

    card.write = wait
    building.build(request(manifest, data_dir))


def test_a_killed_build_leaves_no_data_set_and_the_next_one_succeeds(hospital, tmp_path):
    context = multiprocessing.get_context("spawn")
    reached = context.Event()
    process = context.Process(target=_build_slowly, args=(hospital, tmp_path, reached))
    process.start()
    assert reached.wait(60)
    with pytest.raises(UserError, match="holds no medical_slices"):
        find_dataset(tmp_path)
    with pytest.raises(UserError, match="another build is writing here"):
        building.build(request(hospital, tmp_path))
    process.kill()
    process.join()
    assert any(tmp_path.iterdir())  # what the killed build left
    building.build(request(hospital, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["medical_slices"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("write() failed: No space left on device; writing x.array_record"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(hospital, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(metadata, "write", full)
    with pytest.raises(UserError, match="one_line.*: the disk is full; free some space"):
        building.build(request(hospital, tmp_path))
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_seen_before_the_work(hospital, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(1000, 900, 100)
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="slices need .* GiB and 0.00 are free"):
        building.build(request(hospital, tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_beam_its_flag_is_one_line(hospital, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(UserError, match=r"pip install 'medsam_jax\[beam\]'"):
        building.build(request(hospital, tmp_path, beam_runner="DirectRunner"))
    assert not list(tmp_path.iterdir())


def test_a_plan_travels_to_beam_workers(tmp_path):
    plan = Plan((), (), {"a": {1: 1}}, slices.Options(recipe="v1"), str(tmp_path))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_folder_is_found_by_name_or_by_recipe(built, tmp_path):
    directory = find_dataset(built).directory
    assert find_dataset(directory).directory == directory
    with pytest.raises(UserError, match="recipe lite, recipe v1 is needed"):
        find_dataset(built, "v1")
    with pytest.raises(UserError, match="split 'test' has no slices; it has train, tune"):
        open_dataset(built, "test")
    with pytest.raises(UserError, match="holds no medical_slices data set"):
        find_dataset(tmp_path)


def test_the_record_is_json(built):
    path = pathlib.Path(find_dataset(built).directory) / "medical_slices.json"
    text = path.read_text()
    assert json.loads(text)["format_version"] == 1
    assert "NaN" not in text


def test_ignored_labels_are_not_stored(hospital, tmp_path):
    rows = [("p0", "ct0.nii.gz", "ct0_mask.nii.gz", "CT", "organs", "train", "300")]
    header = "case_id,image,mask,modality,task,split,ignore"
    building.build(request(write_manifest(hospital.parent / "i.csv", rows, header), tmp_path))
    assert {
        label for record in records(tmp_path, "train") for label in np.unique(record["mask"])
    } == {
        0,
        1,
    }


@pytest.mark.parametrize("name", ["w [v2]", "**", "back\\slash", "n\nl", "\u00e9 #1"])
def test_any_folder_holds_a_data_set(hospital, tmp_path, monkeypatch, name):
    for file in ("us0.png", "us0_mask.png"):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(hospital.parent / file, tmp_path / name / file)
    rows = [("u", "us0.png", "us0_mask.png", "US", "mass", "train")]
    manifest = write_manifest(tmp_path / name / "cases.csv", rows)
    monkeypatch.setattr(card, "write", WRITE_CARD)
    directory = building.build(request(manifest, tmp_path / name / "data"))
    assert directory.is_relative_to(tmp_path / name)
    (record,) = records(tmp_path / name / "data", "train")
    assert record["mask"].any()
    assert len(list((directory / "figures").iterdir())) == 4
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
        "cases.csv",
        "data",
        "us0.png",
        "us0_mask.png",
    ]


def test_a_figure_that_fails_does_not_cost_the_data_set(hospital, tmp_path, monkeypatch, capsys):
    def fail(info):
        raise RuntimeError("no font")

    monkeypatch.setattr(card, "write", WRITE_CARD)
    monkeypatch.setattr(card, "_spacings", fail)
    directory = building.build(request(hospital, tmp_path))
    assert sorted(path.name for path in (directory / "figures").iterdir()) == [
        "intensities.png",
        "object_sizes.png",
        "samples.png",
    ]
    assert "spacings.png" not in (directory / "README.md").read_text()
    assert "figures/spacings.png: not drawn (RuntimeError: no font)" in capsys.readouterr().err


def test_a_build_leaves_no_temporary_folders(hospital, tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    building.build(request(hospital, tmp_path / "data"))
    assert not list(temporary.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_first(hospital, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/data: cannot be written .*is a file"):
        building.build(request(hospital, tmp_path / "file" / "data"))
    assert not capsys.readouterr().out
