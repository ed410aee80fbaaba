"""Pictures of results: outlines and prompts on slices, montages, GIFs.

The truth, a prediction and a prompt have one colour each, in every figure.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, Real, UInt8

from medsam_jax.io.files import write_whole

# RGB, from Okabe and Ito's palette: readers with any colour vision tell them apart.
TRUTH = (0, 200, 150)
PREDICTION = (235, 110, 20)
PROMPT = (240, 228, 66)
BESIDE = (220, 40, 40)  # points beside the object
LEGEND = "truth green, prediction orange, prompt yellow"
# Several predicted objects: the same palette without the truth's and the prompts' colours.
OBJECTS = (PREDICTION, (86, 180, 233), (204, 121, 167), (0, 114, 178), (255, 255, 255))
OBJECTS += ((160, 110, 255),)
TRUTHS = (TRUTH, *OBJECTS[1:])  # several objects of the truth: never in the prediction's colour

_MIN_SIDE, _TILE, _TILES = 512, 256, 20


def overlay(
    image: UInt8[np.ndarray, "h w *c"],
    truth: Bool[np.ndarray, "h w"] | None = None,
    prediction: Bool[np.ndarray, "h w"] | None = None,
    box: Real[np.ndarray, " 4"] | None = None,
    points: Real[np.ndarray, "n 2"] | None = None,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Draws the outlines of the truth and of a prediction, and the prompt, on a slice.

    Args:
      box: (x_min, y_min, x_max, y_max), pixels of the slice; its far sides belong to the box.
      points: (x, y), pixels of the slice.

    Returns:
      uint8 RGB, enlarged as in `_Canvas`.
    """
    canvas = _Canvas(image)
    if box is not None:
        canvas.box(box)
    for x, y in [] if points is None else np.asarray(points).tolist():
        canvas.point(x, y, PROMPT)
    for mask, colour in ((truth, TRUTH), (prediction, PREDICTION)):
        if mask is not None:
            canvas.outline(mask, colour)
    return canvas.pixels


def draw(
    image: UInt8[np.ndarray, "h w *c"],
    labels: Integer[np.ndarray, "h w"],
    prompts: Iterable[dict[str, Any]] = (),
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Draws the outlines of all predicted objects of a slice, and their prompts.

    Args:
      prompts: each with `box` [x0, y0, x1, y1] or `points` [x, y, label]: boxes are yellow,
        points yellow (on the object) or red (beside it) crosses.
    """
    canvas = _Canvas(image)
    for label in np.unique(labels[labels > 0]).tolist():
        canvas.outline(labels == label, OBJECTS[(label - 1) % len(OBJECTS)])
    for prompt in prompts:
        if "box" in prompt:
            canvas.box(np.array(prompt["box"], float))
        for x, y, kind in prompt.get("points", ()):
            canvas.point(x, y, PROMPT if kind else BESIDE)
    return canvas.pixels


class _Canvas:
    """A slice to draw on, in the slice's own pixels.

    Small slices are enlarged by a whole factor first, so that thin lines stay thin and outlines
    follow the pixels' edges; on large ones lines are thick enough to be seen when shrunk.
    """

    def __init__(self, image: UInt8[np.ndarray, "h w *c"]):
        side = max(image.shape[:2])
        self._factor = max(1, -(-_MIN_SIDE // side))
        self._width = max(1, round(side * self._factor / 500))
        rgb = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        self.pixels = np.ascontiguousarray(self._enlarged(np.asarray(rgb, np.uint8)))

    def outline(self, mask: Bool[np.ndarray, "h w"], colour: tuple[int, int, int]) -> None:
        import cv2

        large = self._enlarged(np.asarray(mask, bool).astype(np.uint8))
        contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(self.pixels, contours, -1, colour, self._width + 1)

    def box(self, box: Real[np.ndarray, " 4"]) -> None:
        import cv2

        x0, y0, x1, y1 = np.round(np.asarray(box)).astype(int).tolist()
        far = ((x1 + 1) * self._factor - 1, (y1 + 1) * self._factor - 1)
        cv2.rectangle(self.pixels, (x0 * self._factor, y0 * self._factor), far, PROMPT, self._width)

    def point(self, x: float, y: float, colour: tuple[int, int, int]) -> None:
        import cv2

        centre = int((x + 0.5) * self._factor), int((y + 0.5) * self._factor)
        size, thickness = 14 * self._width, 2 * self._width
        cv2.drawMarker(self.pixels, centre, colour, cv2.MARKER_CROSS, size, thickness)

    def _enlarged(self, array: np.ndarray) -> np.ndarray:
        return array.repeat(self._factor, axis=0).repeat(self._factor, axis=1)


def window_around(masks: Bool[np.ndarray, "n h w"], smallest: int = 48) -> tuple[slice, slice]:
    """Returns the square part of a slice to show: twice the extent of what any mask holds."""
    rows, columns = masks.any(axis=(0, 2)), masks.any(axis=(0, 1))
    ends = [np.flatnonzero(line)[[0, -1]] for line in (rows, columns)]
    side = max(smallest, *(2 * int(end[1] - end[0] + 1) for end in ends))
    window = []
    for end, length in zip(ends, masks.shape[1:], strict=True):
        start = int(end.sum()) // 2 - side // 2
        start = max(0, min(start, length - side))
        window.append(slice(start, min(start + side, length)))
    return window[0], window[1]


def montage(
    slices: UInt8[np.ndarray, "z h w *c"],
    labels: Integer[np.ndarray, "z h w"],
    prompts: Iterable[dict[str, Any]] = (),
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Draws up to twenty slices, evenly from the first to the last with an object.

    Args:
      prompts: each with its `slice`, which is shown: it takes the place of the nearest other one.
    """
    import cv2

    shown = _labelled(labels)
    chosen = _with_prompted(
        shown[np.unique(np.linspace(0, len(shown) - 1, _TILES).round().astype(int))],
        sorted({prompt["slice"] for prompt in prompts}),
    )
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


def _with_prompted(evenly: np.ndarray, prompted: list[int]) -> list[int]:
    """Returns at most as many slices as fit a montage, the prompted ones among them."""
    chosen, prompted = evenly.tolist(), prompted[:_TILES]
    for index in prompted:
        if index not in chosen:
            if len(chosen) == _TILES:
                others = [one for one in chosen if one not in prompted]
                chosen.remove(min(others, key=lambda one: abs(one - index)))
            chosen.append(index)
    return sorted(chosen)


def write_gif(
    path: Path, slices: UInt8[np.ndarray, "z h w *c"], labels: Integer[np.ndarray, "z h w"]
) -> None:
    """Writes the slices with objects, and two more at either end, eight a second."""
    from PIL import Image

    shown = _labelled(labels)
    frames = []
    for index in range(max(shown[0] - 2, 0), min(shown[-1] + 3, len(labels))):
        frame = Image.fromarray(draw(slices[index], labels[index]))
        frame.thumbnail((384, 384))
        frames.append(frame.convert("P", palette=Image.Palette.ADAPTIVE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)


def _labelled(labels: np.ndarray) -> np.ndarray:
    """Returns indices from the first slice with an object to the last; all where there is none."""
    found = np.flatnonzero(labels.any(axis=(1, 2)))
    return np.arange(found[0], found[-1] + 1) if found.size else np.arange(len(labels))


def figure_of(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure of that size in inches, drawn in memory.

    pyplot and its backend, which may be a notebook's or need a screen, take no part.
    """
    is_first = "matplotlib" not in sys.modules
    chosen = os.environ.pop("MPLBACKEND", None)  # importing matplotlib fails if it is not there
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen
    if chosen is not None and is_first:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = chosen  # as the import would have set it
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figures(
    folder: Path, figures: Mapping[str, Callable[[], Any]], dpi: int = 150
) -> list[str]:
    """Draws figures by file name and writes them as PNGs, each whole; returns the names written.

    One that fails costs a line, and never the results that it would show.
    """
    names = []
    for name, draw_figure in figures.items():
        try:
            figure = draw_figure()
            write_whole(
                folder / name, lambda path, of=figure: of.savefig(path, format="png", dpi=dpi)
            )
        except Exception as error:  # of matplotlib, of the fonts, of the disk: all alike here
            reason = (str(error).splitlines() or [""])[0]
            print(
                f"warning: {folder / name}: not drawn ({type(error).__name__}: {reason}); all "
                "other results are written",
                file=sys.stderr,
            )
        else:
            names.append(name)
    return names
