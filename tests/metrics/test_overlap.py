"""DSC and IoU against hand-computed values and the empty policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.metrics import (
    dice,
    dice_batch,
    iou,
    iou_batch,
    normalized_surface_dice,
    nsd_batch,
)

A = np.array([[1, 1, 0], [0, 1, 0]], bool)
B = np.array([[0, 1, 1], [0, 1, 0]], bool)
EMPTY = np.zeros((2, 3), bool)


@pytest.mark.parametrize("form", [np.asarray, jnp.asarray])
def test_hand_computed(form):
    assert dice(form(A), form(B)) == pytest.approx(4 / 6, abs=1e-7)
    assert iou(form(A), form(B)) == pytest.approx(2 / 4, abs=1e-7)
    assert dice(form(A), form(A)) == iou(form(A), form(A)) == 1


@pytest.mark.parametrize("form", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("metric", [dice, iou])
def test_empty_policy(form, metric):
    assert np.isnan(metric(form(EMPTY), form(EMPTY)))
    assert metric(form(A), form(EMPTY)) == metric(form(EMPTY), form(A)) == 0


def test_batch_and_vmap_equal_the_numpy_form():
    rng = np.random.default_rng(0)
    pred, target = rng.random((2, 5, 7, 9)) < rng.random((2, 5, 1, 1))
    for batched, single in ((dice_batch, dice), (iou_batch, iou)):
        expected = [single(p, t) for p, t in zip(pred, target, strict=True)]
        np.testing.assert_allclose(batched(pred, target), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(single)(jnp.array(pred), jnp.array(target)), expected)


def test_batch_takes_integer_masks():
    np.testing.assert_array_equal(
        dice_batch(A[None].astype(np.uint8), B[None]), dice_batch(A[None], B[None])
    )


@pytest.mark.parametrize("form", [np.asarray, jnp.asarray])
def test_bad_input_is_refused(form):
    with pytest.raises(ValueError, match=r"\(2, 3\) and target \(3, 2\)"):
        dice(form(A), form(B.T))
    with pytest.raises(ValueError, match="pred holds nan"):
        dice(form(np.where(A, np.nan, 0)), form(B))
    with pytest.raises(ValueError, match="target holds 2"):
        iou(form(A), form(B * 2))


@pytest.mark.parametrize("metric", [dice_batch, iou_batch, lambda *m: nsd_batch(*m, (1, 1), 1.0)])
def test_batches_refuse_label_maps(metric):
    with pytest.raises(ValueError, match="target holds 2"):
        metric(A[None], jnp.array(B[None] * 2))


@pytest.mark.parametrize("metric", [dice, iou, lambda *m: normalized_surface_dice(*m, (1, 1), 1.0)])
def test_traced_masks_must_be_boolean(metric):
    """A label map's values are not known under jit; as numbers it would pass as one mask."""
    masks = A, B
    assert float(jax.jit(metric)(*masks)) == pytest.approx(metric(*masks), abs=1e-6)
    with pytest.raises(ValueError, match="target is traced and of int"):
        jax.jit(metric)(A, B * 2)
