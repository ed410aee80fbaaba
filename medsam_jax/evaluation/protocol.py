"""Prompts drawn from the truth, the same ones for every model."""

import dataclasses

import numpy as np
from jaxtyping import Bool

from medsam_jax.data.prompts import Prompt, box_from_mask, draw_points, jitter_box
from medsam_jax.errors import UserError

POINTS = {"point": (1, 0), "points": (3, 3)}  # on the object, beside it
PROMPTS = ("box", *POINTS)


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
        points, labels = draw_points(mask, *POINTS[self.prompt], rng)
        return Prompt(points=points, labels=labels)
