"""Prompts drawn from the truth, the same ones for every model."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from medsam_jax.data.prompts import box_from_mask, jitter_box, sample_points
from medsam_jax.errors import UserError

POINTS = {"point": (1, 0), "points": (3, 3)}  # on the object, beside it
PROMPTS = ("box", *POINTS)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A box, or points with labels (1 on the object, 0 beside it); pixels, xy."""

    box: Float[np.ndarray, " 4"] | None = None
    points: Float[np.ndarray, "n 2"] | None = None
    labels: Int[np.ndarray, " n"] | None = None

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Prompt":
        """Returns the prompt with `move` applied to its coordinates (x, y), [N, 2]."""
        if self.box is not None:
            corners = move(self.box.reshape(2, 2)).astype(np.float32)
            return dataclasses.replace(self, box=corners.reshape(4))
        return dataclasses.replace(self, points=move(self.points).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to draw prompts; the same seed gives every checkpoint and run the same ones.

    box: the object's extreme pixels; each side moves outwards by 0 to `box_shift` pixels.
    point: one pixel of the object, drawn uniformly. points: three, and three beside it.
    """

    prompt: str = "box"
    box_shift: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise UserError(f"--prompt: {self.prompt!r} given; use one of {', '.join(PROMPTS)}")
        if self.box_shift < 0:
            raise UserError(f"--box_shift: {self.box_shift} given; use 0 or more pixels")
        if self.box_shift and self.prompt != "box":
            raise UserError("--box_shift: works with --prompt box only; leave it out")

    def draw(self, mask: Bool[np.ndarray, "h w"], index: tuple[int, ...]) -> Prompt:
        """Draws the prompt for an object.

        Args:
          mask: the object, on the valid part of its slice.
          index: identifies the object in the data; beside the seed, the draw depends on it alone.
        """
        rng = np.random.default_rng([self.seed, *index])
        if self.prompt == "box":
            box = box_from_mask(mask)
            if self.box_shift:
                box = jitter_box(box, self.box_shift, np.array(mask.shape), rng)
            return Prompt(box=box)
        on, beside = POINTS[self.prompt]
        points, labels = [sample_points(mask, on, rng)], [1] * on
        if beside and not mask.all():
            points.append(sample_points(~mask, beside, rng))
            labels += [0] * beside
        else:  # nothing beside it: points of SAM's padding label, so that all shapes are equal
            points.append(np.zeros((beside, 2), np.float32))
            labels += [-2] * beside
        return Prompt(points=np.concatenate(points), labels=np.array(labels, np.int32))
