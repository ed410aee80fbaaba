"""COCO's JSON of the masks of pictures, gathered from the records that lie beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from medsam_jax.data.run_lengths import compress_rle, encode_rle
from medsam_jax.inference.mask_records import mask_box
from medsam_jax.io.files import write_json

FILE = "coco.json"


def annotate(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """COCO's `segmentation` (compressed run lengths) and `bbox` (x, y, width, height)."""
    x0, y0, x1, y1 = mask_box(mask)
    bbox = [x0, y0, x1 - x0 + 1, y1 - y0 + 1] if mask.any() else [0, 0, 0, 0]
    return {"segmentation": compress_rle(encode_rle(mask)), "bbox": bbox}


def write_coco(output: Path) -> Path | None:
    """Writes `coco.json` of every picture with a record in the folder; None where there is none.

    Categories are the objects' names; objects without a name are "object".
    """
    images, annotations = [], []
    categories: dict[str, int] = {}
    for path in sorted(output.glob("*.json")):
        record = _read(path)
        if record is None:
            continue
        height, width = record["shape"][-2:]
        images.append(
            {
                "id": len(images) + 1,
                "file_name": Path(record["image"]).name,
                "height": height,
                "width": width,
            }
        )
        for found in record["objects"]:
            name = found["name"] or "object"
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": categories.setdefault(name, len(categories) + 1),
                    "segmentation": found["segmentation"],
                    "bbox": found["bbox"],
                    "area": found["area_px"],
                    "iscrowd": 0,
                    "score": found["predicted_iou"],
                }
            )
    if not images:
        return None
    listed = [{"id": number, "name": name} for name, number in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": listed}
    write_json(output / FILE, content)
    return output / FILE


def _read(path: Path) -> dict[str, Any] | None:
    """A record of ours with masks in it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if path.name == FILE or not isinstance(record, dict) or not record.get("is_picture"):
        return None
    return record
