"""Pictures of single results: a slice with the contours of truth and prediction, and its prompt."""

import numpy as np
from jaxtyping import Bool, Num, UInt8

# Okabe and Ito's palette: told apart by readers with any colour vision. RGB.
TRUTH = (0, 200, 150)
PREDICTION = (235, 110, 20)
PROMPT = (240, 228, 66)

_MIN_SIDE = 512


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    truth: Bool[np.ndarray, "h w"],
    prediction: Bool[np.ndarray, "h w"],
    box: Num[np.ndarray, " 4"] | None = None,
    points: Num[np.ndarray, "n 2"] | None = None,
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
