"""Draws an inspected scan: three planes through its middle, contours of its mask, its values."""

from pathlib import Path
from typing import Any

import numpy as np

from medsam_jax.data.modality import is_ct, rule_of
from medsam_jax.data.recipes import DEFAULT_RECIPE, get_recipe
from medsam_jax.drawing import TRUTHS, figure_of
from medsam_jax.errors import UserError
from medsam_jax.io.files import write_whole

from .inspection import Inspected

_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))
_BINS, _VALUES = 100, 2**22  # of the histogram
_LONGEST = 1024  # pixels of a panel's longer side


def write_figure(path: Path, inspected: Inspected) -> None:
    """Writes the PNG of a scan that could be read."""
    figure = draw(inspected)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=100))


def draw(inspected: Inspected) -> Any:
    """Returns a figure; planes have the spacing's aspect and letters of the patient's sides.

    The plane that the library cuts comes first, drawn as it is stored. The others are turned over
    where that puts the head at the top. With a mask, planes run through most of its voxels.
    """
    scan, found = inspected.scan, inspected.description
    cut = "zyx".index(found.slice_axis)
    axes = [cut, *(axis for axis in range(3) if axis != cut)] if found.slices > 1 else [cut]
    figure = figure_of(10, 10 if len(axes) > 1 else 5.4)
    panels = figure.subplots(2 if len(axes) > 1 else 1, 2, squeeze=False).flat
    low, high, shown = _limits(inspected)
    figure.suptitle(f"{Path(found.path).name}: grey levels are {shown}", fontsize=10, wrap=True)
    for panel, axis in zip(panels, axes, strict=False):
        _plane(panel, inspected, axis, turn=axis != cut, limits=(low, high))
    _histogram(list(panels)[len(axes) :] or [figure.axes[-1]], scan.array, low, high)
    return figure


def _limits(inspected: Inspected) -> tuple[float, float, str]:
    """Returns the intensities of black and white, by the default recipe, and their name."""
    array, modality = inspected.scan.array, inspected.description.modality
    recipe = get_recipe(DEFAULT_RECIPE)
    if array.dtype == np.uint8:
        return 0.0, 255.0, "as stored"
    try:
        low, high = rule_of(modality).limits(array, recipe, None)[:2]
    except UserError:  # constant, or nothing above 0
        low, high = float(array.min()), float(array.max())
    rule = "the window of CT" if is_ct(modality) else f"by percentiles, {modality or 'not CT'}"
    return low, max(high, low + 1e-6), f"{low:.5g} to {high:.5g} ({rule})"


def _plane(
    panel: Any, inspected: Inspected, axis: int, turn: bool, limits: tuple[float, float]
) -> None:
    """Draws the plane across an array axis: rows and columns are the other two, in their order."""
    from matplotlib import patheffects

    scan, found, labels = inspected.scan, inspected.description, inspected.labels
    index = _index(scan.array.shape[axis], labels, axis)
    plane = np.take(scan.array, index, axis)
    rows, columns = (other for other in range(3) if other != axis)
    mask = None if labels is None else np.take(labels, index, axis)
    letters = found.orientation[::-1] or "   "  # z, y, x
    down, right = letters[rows], letters[columns]
    if turn and down == "S":
        plane, down = plane[::-1], "I"
        mask = None if mask is None else mask[::-1]
    # An axis without spacing has voxels as long as another's.
    steps = [step or min(filter(None, found.spacing_mm), default=1.0) for step in found.spacing_mm]
    steps = steps[::-1]
    low, high = limits
    grey = np.clip((plane.astype(np.float32) - low) / (high - low), 0, 1)
    skip = max(1, max(plane.shape[:2]) // _LONGEST)
    grey = grey[::skip, ::skip]
    colours = {"cmap": "gray", "vmin": 0, "vmax": 1} if grey.ndim == 2 else {}
    extent = (-0.5, plane.shape[1] - 0.5, plane.shape[0] - 0.5, -0.5)
    aspect = steps[rows] / steps[columns]
    panel.imshow(grey, extent=extent, aspect=aspect, interpolation="nearest", **colours)
    if mask is not None:
        for label in np.unique(mask[mask > 0]).tolist():
            colour = np.array(TRUTHS[(label - 1) % len(TRUTHS)]) / 255
            panel.contour(mask == label, levels=[0.5], colors=[colour], linewidths=1.2)
    panel.set(xticks=[], yticks=[])
    if found.slices > 1:
        cut = ", cut here" if "zyx"[axis] == found.slice_axis else ""
        panel.set_title(f"{'zyx'[axis]} = {index} of {scan.array.shape[axis]}{cut}", fontsize=9)
    if found.orientation:
        outline = [patheffects.withStroke(linewidth=3, foreground="black")]
        for place, letter in (
            ((0.5, 0.98), _OPPOSITE[down]),
            ((0.5, 0.02), down),
            ((0.02, 0.5), _OPPOSITE[right]),
            ((0.98, 0.5), right),
        ):
            style = {"color": "yellow", "ha": "center", "va": "center", "path_effects": outline}
            panel.text(*place, letter, transform=panel.transAxes, **style)


def _index(count: int, labels: np.ndarray | None, axis: int) -> int:
    """Returns the middle slice, or the one with most labelled voxels."""
    if labels is None:
        return count // 2
    others = tuple(other for other in range(3) if other != axis)
    return int(np.count_nonzero(labels, axis=others).argmax())


def _histogram(panels: list[Any], array: np.ndarray, low: float, high: float) -> None:
    panel = panels[-1]
    every = max(1, array.size // _VALUES)
    counts, edges = np.histogram(array.ravel()[::every], bins=_BINS)
    panel.stairs(counts, edges, color="0.4", fill=True)
    panel.set_yscale("log")
    for value in (low, high):
        panel.axvline(value, color="tab:orange", linewidth=1)
    panel.set_title("values; black and white in orange", fontsize=9)
