"""Cases and prompts of the LiteMedSAM golden files, for tests and the script that writes them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

# Case of pyradiomics-bhklab: modality. 256 x 256 pixels, 120 x 45 (padded right) and 512 x 512.
CASES = {"brain1": "MR", "breast1": "MR", "lung2": "CT"}
PROMPT_KINDS = ("box", "point", "points", "mask", "box_points", "mask_box")
STRIDE = 5  # between the stored pixels of embeddings and logits


def prompts_of(golden: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Prompts of one kind, with a leading axis of one prompt: points, labels, boxes, masks."""
    points = {"points": golden["points"][None], "labels": golden["labels"][None]}
    boxes = {"boxes": golden["box"][None]}
    masks = {"masks": golden["mask_quarters"][None].astype(np.float32) / 4}
    return {
        "box": boxes,
        "point": {name: value[:, :1] for name, value in points.items()},
        "points": points,
        "mask": masks,
        "box_points": points | boxes,
        "mask_box": masks | boxes,
    }[kind]


def load_golden(case: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name(f"lite_medsam_{case}.npz")) as golden:
        return dict(golden)
