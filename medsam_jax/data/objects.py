"""Selects the objects of a label map to learn: labels, instances and rules for small objects."""

import collections
from collections.abc import Mapping

import numpy as np

from medsam_jax.data.preprocess import resize_mask
from medsam_jax.data.recipes import Recipe

Drops = collections.Counter  # reason -> how many objects

_SMALL = 1 << 16  # label ids below this go through a lookup table instead of a sort


def present_labels(labels: np.ndarray) -> np.ndarray:
    """Returns the ids above 0 in a label map, ascending."""
    if labels.dtype == np.uint8 and labels.ndim == 2:
        import cv2

        histogram = cv2.calcHist([np.ascontiguousarray(labels)], [0], None, [256], [0, 256])
        return np.flatnonzero(histogram[1:]) + 1
    if labels.max(initial=0) >= _SMALL:
        found = np.unique(labels)
        return found[found > 0]
    seen = np.zeros(_SMALL, bool)
    seen[labels] = True
    return np.flatnonzero(seen[1:]) + 1


def remap_labels(labels: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """Replaces original ids by stored ones; labels that the table lacks become background.

    Returns uint8 where the stored ids fit, else int32.
    """
    dtype = np.uint8 if max(table.values(), default=0) <= 255 else np.int32
    if labels.max(initial=0) < _SMALL:
        lookup = np.zeros(_SMALL, dtype)
        for original, stored in table.items():
            if original < _SMALL:
                lookup[original] = stored
        return lookup[labels]
    originals, inverse = np.unique(labels, return_inverse=True)
    stored = np.array([table.get(int(original), 0) for original in originals], dtype)
    return stored[inverse].reshape(labels.shape)


def label_components(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds connected components, each of one label; diagonal neighbours are connected.

    Returns:
      components: int32 like `labels`, 0 is background, numbered by label.
      component_label: [n + 1] the label of each component; 0 for the background.
      component_size: [n + 1] its number of voxels.
    """
    from scipy import ndimage

    structure = np.ones((3,) * labels.ndim, bool)
    components = np.zeros(labels.shape, np.int32)
    component_label, component_size = [0], [0]
    for index, region in enumerate(ndimage.find_objects(labels)):
        if region is None:
            continue
        member = labels[region] == index + 1
        numbered, count = ndimage.label(member, structure)
        components[region][member] = numbered[member] + len(component_label) - 1
        component_label += [index + 1] * count
        component_size += np.bincount(numbered.ravel(), minlength=count + 1)[1:].tolist()
    return components, np.array(component_label), np.array(component_size)


def split_instances(labels: np.ndarray, label: int, offset: int) -> np.ndarray:
    """Gives the connected parts of `label` (lesions, nuclei) the ids offset + 1, offset + 2, ..."""
    components, _, _ = label_components((labels == label).astype(np.uint8))
    components[components > 0] += offset
    return np.where(components > 0, components, labels)


def compact_instances(labels: np.ndarray, offset: int) -> np.ndarray:
    """Renumbers the ids above `offset` of one slice from offset + 1 on.

    A scan may hold more lesions than the 255 that fit into a byte; a slice rarely does.
    """
    ids = present_labels(labels)
    table = {int(label): int(label) for label in ids if label <= offset}
    table |= {int(label): offset + 1 + rank for rank, label in enumerate(ids[ids > offset])}
    return remap_labels(labels, table)


def _larger(size: np.ndarray, least: int, drops: Drops, reason: str) -> np.ndarray:
    """Tells which parts have more than `least` pixels, never the background; counts the others."""
    keep = size > least
    keep[0] = False
    drops[reason] = int(np.count_nonzero(~keep[1:] & (size[1:] > 0)))
    return keep


def keep_in_scan(labels: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, Drops]:
    """Applies the recipe's rule for volumes to a label map [Z, H, W]; a single slice has none."""
    drops: Drops = collections.Counter()
    if labels.shape[0] == 1 or recipe.min_voxels == 0:
        return labels, drops
    if recipe.rule == "components":
        parts, _, size = label_components(labels)
        reason = f"3D components of {recipe.min_voxels} voxels or fewer"
    else:
        parts, size = labels, np.bincount(labels.ravel())
        reason = f"labels of {recipe.min_voxels} voxels or fewer in the scan"
    keep = _larger(size, recipe.min_voxels, drops, reason)
    return np.where(keep[parts], labels, 0).astype(labels.dtype), +drops


def keep_in_slice(labels: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, Drops]:
    """Applies the recipe's rule for slices and resizes: [H, W], ids to 255, to uint8 [S, S].

    "components" removes them in the original slice (v2), "label" counts on the stored grid (v1).
    Objects that leave no pixel on the stored grid are counted too.
    """
    drops: Drops = collections.Counter()
    if recipe.rule == "components" and recipe.min_pixels > 0 and labels.any():
        components, _, size = label_components(labels)
        reason = f"2D components of {recipe.min_pixels} pixels or fewer"
        keep = _larger(size, recipe.min_pixels, drops, reason)
        labels = np.where(keep[components], labels, 0)
    labels = labels.astype(np.uint8)
    stored = resize_mask(labels, recipe)
    size = np.bincount(stored.ravel(), minlength=256)
    before = np.bincount(labels.ravel(), minlength=256) > 0
    drops["objects without a pixel after the resize"] = int(np.count_nonzero(before & (size == 0)))
    if recipe.rule == "label":
        reason = f"objects of {recipe.min_pixels} pixels or fewer after the resize"
        keep = _larger(size, recipe.min_pixels, drops, reason)
        stored[~keep[stored]] = 0
    return stored, +drops
