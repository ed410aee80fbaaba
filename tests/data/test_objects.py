"""Small-object rules, instances and label tables on hand-made label maps."""

import dataclasses

import numpy as np

from medsam_jax.data import objects
from medsam_jax.data.recipes import RECIPES


def test_components_touch_diagonally():
    labels = np.zeros((2, 4, 6), np.int32)
    labels[0, 0, 0] = labels[1, 1, 1] = 3  # one component through the corner
    labels[0, 3, 5] = 3
    labels[0, 3, 4] = 1  # another label beside it
    _, label, size = objects.label_components(labels)
    assert sorted(zip(label[1:].tolist(), size[1:].tolist(), strict=True)) == [
        (1, 1),
        (3, 1),
        (3, 2),
    ]


def test_v2_removes_components_below_1000_voxels_and_100_pixels():
    labels = np.zeros((3, 60, 60), np.int32)
    labels[:, :20, :17] = 1  # 1020 voxels, 340 pixels a slice
    labels[:, 30:50, 30:46] = 1  # 960 voxels: removed
    labels[1, 25, :37] = 2  # 37 voxels: removed
    kept, drops = objects.keep_in_scan(labels, RECIPES["v2"])
    assert np.count_nonzero(kept) == 1020
    assert drops == {"3D components of 999 voxels or fewer": 2}
    exactly = np.zeros((10, 60, 60), np.int32)
    exactly[:, :10, :10] = 1  # 1000 voxels, 100 pixels: both kept
    kept, drops = objects.keep_in_scan(exactly, RECIPES["v2"])
    assert np.count_nonzero(kept) == 1000
    stored, drops = objects.keep_in_slice(kept[0], RECIPES["v2"])
    assert not drops
    assert stored.any()
    exactly[0, 9, 9] = 0
    stored, drops = objects.keep_in_slice(exactly[0], RECIPES["v2"])
    assert drops == {"2D components of 99 pixels or fewer": 1}
    assert not stored.any()


def test_v1_counts_the_label_in_the_scan_and_after_the_resize():
    labels = np.zeros((2, 256, 256), np.int32)
    labels[:, :20, :25] = 1  # 1000 voxels: not more than 1000
    labels[:, 100:120, 100:126] = 2  # 1040 voxels
    kept, drops = objects.keep_in_scan(labels, RECIPES["v1"])
    assert np.unique(kept).tolist() == [0, 2]
    assert drops == {"labels of 1000 voxels or fewer in the scan": 1}
    plane = np.zeros((512, 512), np.int32)
    plane[:20, :20] = 1  # 100 pixels on the stored grid
    plane[100:120, 100:122] = 2  # 110
    stored, drops = objects.keep_in_slice(plane, RECIPES["v1"])
    assert np.unique(stored).tolist() == [0, 2]
    assert drops == {"objects of 100 pixels or fewer after the resize": 1}


def test_pictures_have_no_voxel_rule():
    labels = np.zeros((1, 40, 40), np.int32)
    labels[0, :11, :10] = 1
    kept, drops = objects.keep_in_scan(labels, RECIPES["v2"])
    np.testing.assert_array_equal(kept, labels)
    assert not drops


def test_objects_that_vanish_in_the_resize_are_counted():
    recipe = dataclasses.replace(RECIPES["lite"], min_pixels=0)
    plane = np.zeros((2560, 2560), np.int32)
    plane[0:3, 0:3] = 4  # between two pixel centres of the stored grid
    plane[1000:1200, 1000:1200] = 5
    stored, drops = objects.keep_in_slice(plane, recipe)
    assert np.unique(stored).tolist() == [0, 5]
    assert drops == {"objects without a pixel after the resize": 1}


def test_remap_drops_what_the_table_lacks():
    labels = np.array([[0, 300, 7], [1024, 300, 7]])
    found = objects.remap_labels(labels, {300: 1, 1024: 2})
    assert found.tolist() == [[0, 1, 0], [2, 1, 0]]


def test_instances_are_numbered_by_slice():
    labels = np.zeros((2, 9, 9), np.int32)
    labels[0, 0, 0] = labels[0, 4, 4] = labels[1, 8, 8] = 2
    labels[:, 0, 8] = 1
    parts = objects.split_instances(labels, 2, offset=2)
    assert [parts[0, 0, 0], parts[0, 4, 4], parts[1, 8, 8], parts[0, 0, 8]] == [3, 4, 5, 1]
    second = objects.compact_instances(parts[1], offset=2)
    assert [second[8, 8], second[0, 8]] == [3, 1]
