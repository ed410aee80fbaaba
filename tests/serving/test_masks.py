"""Masks that the viewers' client gets are those of `VolumePredictor`, voxel by voxel."""

import numpy as np
import pytest

from medsam_jax.inference.volume import VolumePredictor
from medsam_jax.serving import planes

SPACING = (2.5, 1.0, 1.5)


def opened(connect, scan, spacing=SPACING):
    client = connect()
    client.set_image(scan[None], {"spacing": spacing} if spacing else None)
    client.set_target_buffer(np.zeros(scan.shape, np.uint8))
    return client


def volume_of(model, scan, axis):
    """A `VolumePredictor` of the slices across an axis, made without the server."""
    volume = VolumePredictor(model.predictor)
    order = [axis, *(other for other in range(3) if other != axis)]
    spacing = [SPACING[other] for other in order]
    volume.set_volume(np.moveaxis(scan, axis, 0), "MR", spacing=spacing)
    return volume


def as_scan(mask, axis):
    return np.moveaxis(mask, 0, axis).astype(np.uint8)


BOXES = {
    0: [[3, 4], [3, 16], [4, 21]],
    1: [[0, 7], [9, 10], [4, 21]],
    2: [[0, 7], [3, 16], [12, 13]],
}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("follow", [True, False])
def test_a_box_in_every_plane(connect, model, scan, axis, follow):
    client = opened(connect, scan)
    client.set_do_autozoom(follow)
    changed = client.add_bbox_interaction(BOXES[axis], True)
    rows, columns = (BOXES[axis][other] for other in range(3) if other != axis)
    volume = volume_of(model, scan, axis)
    volume.add_prompt(BOXES[axis][axis][0], box=[columns[0], rows[0], columns[1] - 1, rows[1] - 1])
    mask, _ = volume.propagate() if follow else volume.predict_slices()
    np.testing.assert_array_equal(client.target_buffer, as_scan(mask, axis))
    where = np.argwhere(as_scan(mask, axis))
    assert mask.any()
    assert changed == [[a, b + 1] for a, b in zip(where.min(0), where.max(0), strict=True)]


def test_prompts_accumulate_and_meet(connect, model, scan):
    client = opened(connect, scan)
    client.add_bbox_interaction([[1, 2], [3, 16], [4, 21]], True)
    client.add_bbox_interaction([[5, 6], [5, 14], [6, 19]], True)
    client.add_point_interaction([5, 9, 12], True)
    client.add_point_interaction([5, 2, 3], False)
    volume = volume_of(model, scan, 0)
    volume.add_prompt(1, box=[4, 3, 20, 15])
    volume.add_prompt(5, [[12, 9], [3, 2]], [1, 0], [6, 5, 18, 13])
    mask, _ = volume.propagate()
    assert mask[3].any()
    np.testing.assert_array_equal(client.target_buffer, mask)


def test_prompts_that_wait_are_answered_together(connect, model, scan):
    client = opened(connect, scan)
    assert (
        client.add_bbox_interaction([[1, 2], [3, 16], [4, 21]], True, run_prediction=False) is None
    )
    client.add_bbox_interaction([[5, 6], [5, 14], [6, 19]], True, run_prediction=False)
    assert not client.target_buffer.any()
    assert client._predict() is not None
    volume = volume_of(model, scan, 0)
    volume.add_prompt(1, box=[4, 3, 20, 15])
    volume.add_prompt(5, box=[6, 5, 18, 13])
    np.testing.assert_array_equal(client.target_buffer, volume.propagate()[0])


def test_undo_goes_back_through_every_step(connect, scan):
    client = opened(connect, scan)
    before = [client.target_buffer.copy()]
    for box in ([[1, 2], [3, 16], [4, 21]], [[5, 6], [5, 14], [6, 19]], [[3, 4], [1, 9], [2, 9]]):
        client.add_bbox_interaction(box, True)
        before.append(client.target_buffer.copy())
    for expected in before[-2::-1]:
        assert client.undo()
        np.testing.assert_array_equal(client.target_buffer, expected)
    assert not client.undo()


def test_the_next_object_starts_empty(connect, scan):
    client = opened(connect, scan)
    client.add_bbox_interaction(BOXES[0], True)
    first = client.target_buffer.copy()
    client.reset_interactions()
    assert client._predict() is None
    client.add_bbox_interaction([[3, 4], [1, 9], [2, 9]], True)
    client.reset_interactions()
    client.add_bbox_interaction(BOXES[0], True)
    np.testing.assert_array_equal(client.target_buffer, first)


def test_a_negative_scribble_leaves_its_pixels_out(connect, scan):
    client = opened(connect, scan)
    client.add_bbox_interaction(BOXES[0], True)
    inside = np.argwhere(client.target_buffer[3])[:5]
    crop = np.zeros((1, *scan.shape[1:]), np.uint8)
    crop[0, inside[:, 0], inside[:, 1]] = 1
    client.add_scribble_interaction(crop, False, interaction_bbox=[[3, 4], [0, 20], [0, 26]])
    assert not client.target_buffer[3][crop[0] > 0].any()
    assert client.target_buffer[3].any()


def test_a_lasso_is_prompted_by_its_box(connect, model, scan):
    drawn = np.zeros(scan.shape, np.uint8)
    drawn[3, 3:16, 4:21] = 1
    client = opened(connect, scan)
    client.add_lasso_interaction(drawn, True)
    volume = volume_of(model, scan, 0)
    volume.add_prompt(3, box=[4, 3, 20, 15])
    np.testing.assert_array_equal(client.target_buffer, volume.propagate()[0])


def test_a_scribble_lies_in_the_mask(connect, scan):
    drawn = np.zeros(scan.shape, bool)
    drawn[2, 5, 3:9] = True
    client = opened(connect, scan)
    client.add_scribble_interaction(drawn, True)
    assert client.target_buffer[drawn].all()


def test_an_initial_mask_is_kept_where_no_prompt_corrects_it(connect, model, scan):
    initial = np.zeros(scan.shape, np.uint8)
    initial[1:6, 5:12, 6:15] = 1
    client = opened(connect, scan)
    client.add_initial_seg_interaction(initial)
    np.testing.assert_array_equal(client.target_buffer, initial)
    client.add_bbox_interaction(BOXES[0], True)
    volume = volume_of(model, scan, 0)
    volume.add_prompt(3, box=[4, 3, 20, 15])
    expected = initial.copy()
    expected[3] = volume.predict_slices()[0][3]
    np.testing.assert_array_equal(client.target_buffer, expected)
    client.undo()
    np.testing.assert_array_equal(client.target_buffer, initial)


def test_an_initial_mask_alone_is_refined_slice_by_slice(connect, model, scan):
    initial = np.zeros(scan.shape, np.uint8)
    initial[1:6, 5:12, 6:15] = 1
    client = opened(connect, scan)
    client.add_initial_seg_interaction(initial, run_prediction=True)
    volume = volume_of(model, scan, 0)
    for index in range(1, 6):
        volume.add_prompt(index, box=[6, 5, 14, 11])
    np.testing.assert_array_equal(client.target_buffer, volume.predict_slices()[0])


def test_a_picture_without_spacing_and_a_box_past_its_edge(connect, model, scan):
    client = opened(connect, scan[3:4], spacing=None)
    client.add_bbox_interaction([[0.0, 1.0], [3.0, 21.0], [4.0, 27.0]], True)
    volume = volume_of(model, scan[3:4], 0)
    volume.add_prompt(0, box=[4, 3, 25, 19])
    np.testing.assert_array_equal(client.target_buffer, volume.predict_slices()[0])


def test_colours_and_the_buffers_type(connect, model, scan):
    picture = np.stack([scan[3], scan[2], scan[4]])[:, None]
    client = connect()
    client.set_image(picture, {"spacing": [1.0, 1.0]})
    client.set_target_buffer(np.zeros((1, 20, 26), np.float32))
    client.add_bbox_interaction([[0, 1], [3, 16], [4, 21]], True)
    volume = VolumePredictor(model.predictor)
    volume.set_volume(np.moveaxis(picture, 0, -1), "MR")
    volume.add_prompt(0, box=[4, 3, 20, 15])
    np.testing.assert_array_equal(client.target_buffer, volume.predict_slices()[0])


def test_eight_users_are_answered_each_by_his_own_scan(connect, model, scan):
    from concurrent.futures import ThreadPoolExecutor

    scans = [np.roll(scan, 2 * shift, axis=2) for shift in range(8)]

    def masks(one):
        client = opened(connect, one)
        client.add_bbox_interaction(BOXES[0], True)
        return client.target_buffer

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(masks, scans))
    for one, answer in zip(scans, answers, strict=True):
        volume = volume_of(model, one, 0)
        volume.add_prompt(3, box=[4, 3, 20, 15])
        np.testing.assert_array_equal(answer, volume.propagate()[0])


def test_embeddings_stay_within_their_limit(model, scan, monkeypatch):
    made = planes.Planes(model.predictor, scan, SPACING, "MR")
    made.look_at(0, 5)
    assert made.encode_next()
    monkeypatch.setattr(planes, "_MOST_EMBEDDINGS", 3 * made.plane(0).encode(5).embedding.nbytes)
    while made.encode_next():
        pass
    assert made.plane(0).encoded == [4, 5, 6]
    made.look_at(1, 9)
    assert made.encode_next()
    assert made.plane(1).encoded == [9]
    assert len(made.plane(0).encoded) == 2


@pytest.mark.parametrize(("lowest", "found"), [(-1000, "CT"), (-400, None)])
def test_hounsfield_units_are_recognised(scan, lowest, found):
    scan[0, 0, 0] = lowest
    assert planes.guess_modality(scan) == found
