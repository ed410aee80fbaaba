"""Pictures of single results: a slice with the contours of truth and prediction, and its prompt."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# Okabe and Ito's palette: told apart by readers with any colour vision. RGB.
TRUTH = (0, 200, 150)
PREDICTION = (235, 110, 20)
PROMPT = (240, 228, 66)

_MIN_SIDE = 512


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    truth: Bool[np.ndarray, "h w"],
    prediction: Bool[np.ndarray, "h w"],
    box: Float[np.ndarray, " 4"] | None = None,
    points: Float[np.ndarray, "n 2"] | None = None,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Draws the outlines of both masks, and the prompt, on a slice.

    Small slices are enlarged by a whole factor first, so that thin lines stay thin and the outlines
    follow the pixels' edges; on large ones lines are thick enough to be seen when shrunk.

    Args:
      box: (x_min, y_min, x_max, y_max), pixels of the slice; its far sides belong to the box.
      points: (x, y), pixels of the slice.

    Returns:
      uint8 RGB [H', W', 3]: truth green, prediction orange, prompt yellow.
    """
    import cv2

    factor = max(1, -(-_MIN_SIDE // max(image.shape[:2])))
    thin = max(1, round(max(image.shape[:2]) / 600))
    canvas = np.ascontiguousarray(enlarge(np.asarray(image, np.uint8), factor))
    if box is not None:
        x_min, y_min, x_max, y_max = np.round(np.asarray(box)).astype(int)
        far = ((x_max + 1) * factor - 1, (y_max + 1) * factor - 1)
        cv2.rectangle(canvas, (x_min * factor, y_min * factor), far, PROMPT, thin)
    for x, y in [] if points is None else np.asarray(points):
        centre = int((x + 0.5) * factor), int((y + 0.5) * factor)
        cv2.drawMarker(canvas, centre, PROMPT, cv2.MARKER_CROSS, 4 * factor, 2)
    thickness = 2 if factor > 1 else max(1, round(max(image.shape[:2]) / 300))
    for mask, colour in ((truth, TRUTH), (prediction, PREDICTION)):
        large = enlarge(np.asarray(mask, bool).astype(np.uint8), factor)
        contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, colour, thickness)
    return canvas


def window_around(masks: Bool[np.ndarray, "n h w"], smallest: int = 48) -> tuple[slice, slice]:
    """The part of a slice to look at: twice the extent of what is set in any mask, and square."""
    rows, columns = masks.any(axis=(0, 2)), masks.any(axis=(0, 1))
    ends = [np.flatnonzero(line)[[0, -1]] for line in (rows, columns)]
    side = max(smallest, *(2 * int(end[1] - end[0] + 1) for end in ends))
    window = []
    for end, length in zip(ends, masks.shape[1:], strict=True):
        start = int(end.sum()) // 2 - side // 2
        start = max(0, min(start, length - side))
        window.append(slice(start, min(start + side, length)))
    return window[0], window[1]


def enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel `factor` times along both axes."""
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


# Okabe and Ito's palette without black and the prompts' yellow, then white and violet; RGB.
COLOURS = ((235, 110, 20), (0, 200, 150), (86, 180, 233), (204, 121, 167), (0, 114, 178))
COLOURS += ((255, 255, 255), (160, 110, 255))
_BACKGROUND = (220, 40, 40)  # points beside the object
_MIN_SIDE, _TILE, _TILES = 512, 256, 20


def draw(
    image: UInt8[np.ndarray, "h w *c"],
    labels: Int[np.ndarray, "h w"],
    prompts: Iterable[dict[str, Any]] = (),
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Outlines of all objects on a slice, small slices enlarged so that lines stay thin.

    Args:
      prompts: each with `box` [x0, y0, x1, y1] or `points` [x, y, label]: boxes are yellow,
        points yellow (on the object) or red (beside it) crosses.
    """
    import cv2

    factor = max(1, -(-_MIN_SIDE // max(image.shape[:2])))
    width = max(1, round(max(image.shape[:2]) * factor / 500))
    canvas = np.ascontiguousarray(enlarge(_rgb(image), factor))
    for label in np.unique(labels[labels > 0]).tolist():
        mask = enlarge((labels == label).astype(np.uint8), factor)
        outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, outlines, -1, COLOURS[(label - 1) % len(COLOURS)], width + 1)
    for prompt in prompts:
        if "box" in prompt:
            x0, y0, x1, y1 = np.round(prompt["box"]).astype(int)
            far = ((x1 + 1) * factor - 1, (y1 + 1) * factor - 1)
            cv2.rectangle(canvas, (x0 * factor, y0 * factor), far, PROMPT, width)
        for x, y, kind in prompt.get("points", ()):
            centre = int((x + 0.5) * factor), int((y + 0.5) * factor)
            colour = PROMPT if kind else _BACKGROUND
            cv2.drawMarker(canvas, centre, colour, cv2.MARKER_CROSS, 14 * width, 2 * width)
    return canvas


def montage(
    slices: UInt8[np.ndarray, "z h w *c"], labels: Int[np.ndarray, "z h w"]
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Up to twenty slices, evenly from the first to the last with an object, around the objects."""
    import cv2

    shown = _labelled(labels)
    chosen = shown[np.unique(np.linspace(0, len(shown) - 1, _TILES).round().astype(int))]
    window = window_around(labels[shown] > 0) if labels.any() else (slice(None), slice(None))
    tiles = []
    for index in chosen:
        tile = draw(slices[index][window], labels[index][window])
        scale = _TILE / max(tile.shape[:2])
        size = [max(1, round(side * scale)) for side in tile.shape[1::-1]]
        tile = np.ascontiguousarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA))
        cv2.putText(tile, str(index), (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, PROMPT, 1)
        tiles.append(tile)
    columns = min(5, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    return np.vstack(rows)


def write_gif(
    path: Path, slices: UInt8[np.ndarray, "z h w *c"], labels: Int[np.ndarray, "z h w"]
) -> None:
    """The slices with objects, and two more at either end, eight a second."""
    from PIL import Image

    shown = _labelled(labels)
    frames = []
    for index in range(max(shown[0] - 2, 0), min(shown[-1] + 3, len(labels))):
        frame = Image.fromarray(draw(slices[index], labels[index]))
        frame.thumbnail((384, 384))
        frames.append(frame.convert("P", palette=Image.Palette.ADAPTIVE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)


def _labelled(labels: np.ndarray) -> np.ndarray:
    """Indices from the first slice with an object to the last; all slices where there is none."""
    found = np.flatnonzero(labels.any(axis=(1, 2)))
    return np.arange(found[0], found[-1] + 1) if found.size else np.arange(len(labels))


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
