"""Batches: what is in them, and that order depends on nothing but the seed."""

import collections
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medsam_jax.data import input_pipeline
from medsam_jax.data.augment import Augmentation, augment
from medsam_jax.data.datasets import find_dataset, open_dataset
from medsam_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def loader(built, **settings):
    settings = {"batch_size": 4, "seed": 7, "box_jitter": 5} | settings
    return input_pipeline.train_loader(built, settings.pop("split", "train"), **settings)


def digest(batch):
    joined = b"".join(np.ascontiguousarray(batch[name]).tobytes() for name in sorted(batch))
    return hashlib.sha256(joined).hexdigest()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_shapes_and_types(built):
    batch = next(loader(built))
    found = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert found == {
        "image": ((4, 256, 256, 3), "uint8"),
        "mask": ((4, 256, 256), "uint8"),
        "box": ((4, 4), "float32"),
        "valid_shape": ((4, 2), "int32"),
    }


def test_batches_of_one_are_the_examples_of_larger_ones(built):
    ones = np.concatenate([batch["image"] for batch in take(loader(built, batch_size=1), 4)])
    np.testing.assert_array_equal(ones, next(loader(built))["image"])


def test_box_is_the_mask_with_its_jitter(built):
    for batch in take(loader(built), 12):
        assert set(np.unique(batch["mask"])) == {0, 1}
        for mask, box, (height, width) in zip(
            batch["mask"], batch["box"], batch["valid_shape"], strict=True
        ):
            rows, columns = np.nonzero(mask)
            tight = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
            moved = (box - tight) * [-1, -1, 1, 1]
            assert moved.min() >= 0
            assert moved.max() <= 5
            assert box.min() >= 0
            assert box[2] < width
            assert box[3] < height


def test_an_epoch_shows_every_slice_once(built):
    count = find_dataset(built).counts["train"]["slices"]
    batches = take(loader(built, batch_size=count), 3)
    epochs = [sorted(image.tobytes() for image in batch["image"]) for batch in batches]
    assert len(set(epochs[0])) == count
    assert epochs[0] == epochs[1] == epochs[2]
    orders = [[image.tobytes() for image in batch["image"]] for batch in batches]
    assert orders[0] != orders[1]


def test_labels_are_drawn_evenly(built):
    source, _ = open_dataset(built, "train")
    record = next(r for r in (source[i] for i in range(len(source))) if r["mask"].max() == 2)
    draw = input_pipeline.DrawPrompts(box_jitter=0)
    areas = collections.Counter(
        int(draw(record, np.random.default_rng(seed))["mask"].sum()) for seed in range(400)
    )
    assert len(areas) == 2
    assert min(areas.values()) > 150


def test_order_is_a_function_of_the_seed(built):
    first = [digest(batch) for batch in take(loader(built), 8)]
    assert first == [digest(batch) for batch in take(loader(built), 8)]
    assert first != [digest(batch) for batch in take(loader(built, seed=8), 8)]


def test_two_workers_give_the_same_batches(built):
    alone = [digest(batch) for batch in take(loader(built), 6)]
    assert alone == [digest(batch) for batch in take(loader(built, num_workers=2), 6)]


def test_processes_share_one_global_order(built):
    settings = {"batch_size": 8, "positive_points": 2}
    whole = take(loader(built, **settings), 4)
    settings |= {"batch_size": 4, "process_count": 2}
    parts = [take(loader(built, process_index=index, **settings), 4) for index in (0, 1)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name][0::2], shares[0][name])
            np.testing.assert_array_equal(batch[name][1::2], shares[1][name])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_goes_on_where_it_was(built, num_workers):
    iterator = loader(built, num_workers=num_workers)
    take(iterator, 5)
    state = iterator.get_state()
    expected = [digest(batch) for batch in take(iterator, 4)]
    resumed = loader(built, num_workers=num_workers)
    resumed.set_state(state)
    assert [digest(batch) for batch in take(resumed, 4)] == expected


def test_points_lie_on_and_beside_the_object(built):
    batch = next(loader(built, batch_size=16, positive_points=3, negative_points=2))
    assert batch["points"].shape == (16, 5, 2)
    assert batch["point_labels"].tolist() == [[1, 1, 1, 0, 0]] * 16
    for mask, points, (height, width) in zip(
        batch["mask"], batch["points"].astype(int), batch["valid_shape"], strict=True
    ):
        assert mask[points[:, 1], points[:, 0]].tolist() == [1, 1, 1, 0, 0]
        assert (points < [width, height]).all()


def test_a_share_of_the_prompts_is_points(built):
    settings = {"positive_points": 3, "negative_points": 1, "prompts_per_image": 4}
    batches = take(loader(built, batch_size=23, point_share=0.3, **settings), 8)
    labels = np.concatenate([batch["point_labels"].reshape(-1, 4) for batch in batches])
    by_box = np.concatenate([batch["boxes_valid"].ravel() for batch in batches])
    assert abs(np.mean(~by_box) - 0.3) < 0.05
    assert (labels[by_box] == -2).all()
    counts = collections.Counter(
        (int((row == 1).sum()), int((row == 0).sum())) for row in labels[~by_box]
    )
    assert counts.keys() == {(on, beside) for on in (1, 2, 3) for beside in (0, 1)}
    assert min(counts.values()) > np.sum(~by_box) / 6 * 0.5
    with pytest.raises(UserError, match="point_share: 0.3 with positive_points 0"):
        loader(built, point_share=0.3)


def test_several_prompts_an_image_are_different_objects_first(built):
    batch = next(loader(built, batch_size=16, prompts_per_image=3, box_jitter=0))
    assert batch["mask"].shape == (16, 3, 256, 256)
    assert batch["box"].shape == (16, 3, 4)
    two_objects = 0
    for masks, boxes in zip(batch["mask"], batch["box"], strict=True):
        different = {mask.tobytes() for mask in masks}
        if len(different) == 2:
            two_objects += 1
            assert not (masks[0] & masks[1]).any()  # the third repeats one of them
        for mask, box in zip(masks, boxes, strict=True):
            assert (
                mask[int(box[1]) : int(box[3]) + 1, int(box[0]) : int(box[2]) + 1].sum()
                == mask.sum()
            )
    assert two_objects > 0


def test_temperature_evens_out_tasks(built):
    info = find_dataset(built)
    sizes = {name: len(positions) for name, positions in info.groups("train").items()}
    assert sizes == {("organs", "CT"): 12, ("tumour", "MR"): 9, ("mass", "US"): 2}
    source, _ = open_dataset(built, "train")
    group_of = {
        source[int(position)]["image"].tobytes(): name
        for name, positions in info.groups("train").items()
        for position in positions
    }
    for temperature in (2.0, 1000.0):
        batches = take(loader(built, batch_size=20, temperature=temperature), 20)
        drawn = collections.Counter(
            group_of[image.tobytes()] for batch in batches for image in batch["image"]
        )
        weights = {name: size ** (1 / temperature) for name, size in sizes.items()}
        for name, weight in weights.items():
            expected = weight / sum(weights.values())
            assert abs(drawn[name] / 400 - expected) < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"prompts_per_image": 0}, "prompts_per_image: 0"),
        ({"temperature": 0.5}, "temperature: 0.5"),
        ({"split": "test"}, "split 'test'"),
    ],
)
def test_bad_settings(built, settings, message):
    with pytest.raises(UserError, match=message):
        loader(built, **settings)


# --- evaluation


def test_every_object_is_evaluated_once(built):
    info = find_dataset(built)
    objects = input_pipeline.eval_objects(built, "validation", batch_size=4)
    batches = list(objects)
    assert len(batches) == len(objects)
    seen = collections.Counter()
    for batch in batches:
        assert batch["image"].shape[0] == 4
        for at in range(4):
            if batch["weight"][at]:
                names = ("case_id", "modality", "slice_index", "label")
                seen[tuple(batch[name][at] for name in names)] += 1
                rows, columns = np.nonzero(batch["mask"][at])
                tight = [columns.min(), rows.min(), columns.max(), rows.max()]
                assert batch["box"][at].tolist() == tight
    assert len(seen) == info.counts["validation"]["objects"]
    assert set(seen.values()) == {1}
    assert [digest_eval(batch) for batch in batches] == [digest_eval(batch) for batch in objects]


def digest_eval(batch):
    return batch["index"].tolist(), batch["box"].tolist()


def test_processes_evaluate_disjoint_shares_of_equal_length(built):
    settings = {"batch_size": 4, "box_jitter": 3, "seed": 5}
    whole = input_pipeline.eval_objects(built, "validation", **settings)
    boxes = {
        int(index): box.tolist()
        for batch in whole
        for index, box in zip(batch["index"], batch["box"], strict=True)
    }
    shares = [
        input_pipeline.eval_objects(
            built, "validation", process_index=index, process_count=4, **settings
        )
        for index in range(4)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = []
    for share in shares:
        for batch in share:
            for index, weight, box in zip(
                batch["index"], batch["weight"], batch["box"], strict=True
            ):
                assert box.tolist() == boxes[int(index)]  # the same box in any process
                seen += [int(index)] * int(weight)
    assert sorted(seen) == sorted(boxes)


# --- augmentation


def scene():
    rng = np.random.default_rng(0)
    image = np.zeros((32, 32, 3), np.uint8)
    image[:20, :28] = rng.integers(50, 200, (20, 28, 3))
    labels = np.zeros((32, 32), np.uint8)
    labels[3:9, 4:15] = 1
    return image, labels, np.array([20, 28])


def test_flips_move_image_and_mask_together():
    image, labels, valid_shape = scene()
    flip = Augmentation(flip=1.0)
    found, found_labels = augment(image, labels, valid_shape, flip, np.random.default_rng(0))
    np.testing.assert_array_equal(found[:20, :28], image[:20, :28][::-1, ::-1])
    np.testing.assert_array_equal(found_labels[:20, :28], labels[:20, :28][::-1, ::-1])
    assert not found[20:].any()


def test_rotation_keeps_object_and_padding():
    image, labels, valid_shape = scene()
    turn = Augmentation(rotation=30)
    for seed in range(20):
        found, found_labels = augment(image, labels, valid_shape, turn, np.random.default_rng(seed))
        assert not found[20:].any()
        assert not found[:, 28:].any()
        assert 40 < found_labels.sum() < 80
    small = np.zeros_like(labels)
    small[0, 0] = 1  # turned out of the picture, so left where it is
    half = Augmentation(rotation=45)
    for seed in range(20):
        _, found_labels = augment(image, small, valid_shape, half, np.random.default_rng(seed))
        assert found_labels.any()


def test_scale_changes_size_of_image_and_mask_together():
    image, labels, valid_shape = scene()
    grow = Augmentation(scale=0.5)
    areas = []
    for seed in range(40):
        found, found_labels = augment(image, labels, valid_shape, grow, np.random.default_rng(seed))
        assert not found[20:].any()
        assert (found[:20, :28].max(axis=-1)[found_labels[:20, :28] > 0] > 0).all()
        areas.append(found_labels.sum() / labels.sum())
    assert 1 / 1.5**2 - 0.1 < min(areas) < 0.6
    assert 1.5 < max(areas) < 1.5**2 + 0.1


def test_intensity_changes_contrast_and_brightness_only():
    image, labels, valid_shape = scene()
    change = Augmentation(intensity=0.1)
    found, found_labels = augment(image, labels, valid_shape, change, np.random.default_rng(1))
    np.testing.assert_array_equal(found_labels, labels)
    before = image[:20, :28].astype(float).ravel()
    after = found[:20, :28].astype(float).ravel()
    slope, offset = np.polyfit(before, after, 1)
    assert 0.9 < slope < 1.1
    assert np.abs(after - (slope * before + offset)).max() <= 1
    assert not found[20:].any()


def test_augmentation_is_used_and_deterministic(built):
    plain = next(loader(built))
    settings = Augmentation(flip=0.5, rotation=20, intensity=0.1)
    first, second = (next(loader(built, augmentation=settings)) for _ in range(2))
    assert digest(first) == digest(second) != digest(plain)


def test_augmentation_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"augmentation.flip: 2 is not in \[0, 1\]"):
        Augmentation(flip=2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_task_alone(built, temperature):
    info = find_dataset(built)
    count = info.counts["train"]["by_task_and_modality"]["tumour | MR"]["slices"]
    source, _ = open_dataset(built, "train")
    wanted = {r["image"].tobytes() for r in map(source.__getitem__, range(len(source)))}
    batch = next(loader(built, batch_size=count, task="tumour", temperature=temperature))
    seen = {image.tobytes() for image in batch["image"]}
    assert len(seen) == count < len(wanted)
    assert seen <= wanted
    with pytest.raises(UserError, match="no slice of task 'liver'; it has mass, organs, tumour"):
        loader(built, task="liver")


def test_objects_of_one_task_are_those_of_all(built):
    everything = input_pipeline.eval_objects(built, "validation", batch_size=1, box_jitter=5)
    chosen = input_pipeline.eval_objects(
        built, "validation", batch_size=1, box_jitter=5, task="tumour"
    )
    tumours = [batch for batch in everything if batch["task"] == ["tumour"]]
    assert 0 < len(chosen) == len(tumours) < len(everything)
    for one, other in zip(chosen, tumours, strict=True):
        np.testing.assert_array_equal(one["mask"], other["mask"])


@pytest.mark.parametrize("guard", ["", 'if __name__ == "__main__":'])
def test_workers_in_a_script(built, tmp_path, guard):
    """With a main guard nothing but the output; without one a line, and no process is started."""
    use = (
        f"train_loader({str(built)!r}, 'train', batch_size=1, seed=0, box_jitter=0, num_workers=1)"
    )
    lines = [f"batches = {use}", "batch = next(batches)", "print(sorted(batch))"]
    script = tmp_path / "script.py"
    head = f"from medsam_jax.data.input_pipeline import train_loader\n{guard}\n"
    script.write_text(head + "".join(f"{'    ' if guard else ''}{line}\n" for line in lines))
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if guard:
        assert (done.stdout, done.stderr) == ("['box', 'image', 'mask', 'valid_shape']\n", "")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        last = done.stderr.splitlines()[-1]
        assert "num_workers: 1 in a script that its workers would run again; put" in last
        assert done.stderr.count("Traceback") == 1
