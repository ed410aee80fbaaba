"""A checkpoint as the server offers it: what it can do, and volumes opened with it."""

import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.hub import load_model, resolve
from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator
from medsam_jax.inference.predictor import Predictor
from medsam_jax.models.sam import Sam
from medsam_jax.serving.planes import guess_modality
from medsam_jax.serving.volume_session import VolumeSession

_PROTOCOL = "2.6.0"  # of the client whose routes these are
_POINTS_AT_ONCE = (1, 2, 4, 8)


@dataclasses.dataclass(eq=False)
class ServedModel:
    """A model, its name and licence.

    Attributes:
      modality: of all volumes; None: guessed for each.
      takes_points: whether the weights answer points.
    """

    predictor: Predictor
    name: str
    licence: str = "unknown"
    modality: str | None = None

    def __post_init__(self):
        # The same rule by which automatic masks choose their prompts.
        self.takes_points = AutomaticMaskGenerator(self.predictor).prompts == "points"

    @classmethod
    def load(cls, checkpoint: str | os.PathLike, modality: str | None) -> "ServedModel":
        """Loads a checkpoint. Raises UserError as `load_model`, and for a U-Net."""
        model = load_model(checkpoint)
        if not isinstance(model, Sam):
            raise UserError(f"{checkpoint}: takes no prompts; use a SAM or MedSAM checkpoint")
        notes = json.loads((resolve(checkpoint) / "model.json").read_text(encoding="utf-8"))
        name = os.path.basename(os.path.normpath(checkpoint))
        return cls(Predictor(model), name, notes.get("licence") or "unknown", modality)

    def open(self, array: np.ndarray, spacing: Sequence[float]) -> VolumeSession:
        """Returns a session on a volume [X, Y, Z] or [X, Y, Z, 3]."""
        modality = self.modality or guess_modality(array)
        return VolumeSession(self.predictor, array, spacing, modality, self.takes_points)

    def capabilities(self) -> dict[str, object]:
        """Returns the answer to GET /capabilities."""
        kinds = ("points", "bbox2d", "scribble", "lasso")
        offered = dict.fromkeys(kinds, True) | {"points": self.takes_points, "bbox3d": False}
        return {
            "supported_interactions": offered,
            "channel_mapping": {kind: [2 * i, 2 * i + 1] for i, kind in enumerate(kinds)},
            "num_interaction_channels": 2 * len(kinds),
            "supports_initial_label": True,
            "supports_zero_shot_label_refinement": True,
            "preferred_scribble_thickness": [2, 2, 2],
            "interaction_decay": 1.0,  # earlier prompts count as much as later ones
            "inference_session_version": _PROTOCOL,
            "license": f"{self.licence} (medsam_jax, {self.name})",
            "supports_undo": True,
            "do_autozoom": True,
        }

    def warm_up(self) -> None:
        """Compiles the programs of the usual prompts, or reads those that were kept."""
        self.predictor.set_normalised([np.zeros((64, 64), np.uint8)])
        box = np.array([8, 8, 40, 40])
        prompts: list[dict[str, object]] = [{"box": box}]
        for count in _POINTS_AT_ONCE if self.takes_points else ():
            points = {"point_coords": np.full((count, 2), 20.0), "point_labels": np.ones(count)}
            prompts += [points, points | {"box": box}]
        for prompt in prompts:
            self.predictor.predict(**prompt, multimask_output=False)
        self.predictor.reset_image()
