"""Records of objects: sizes, diameters, COCO's fields; and COCO's JSON, gathered from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from medsam_jax.data.run_lengths import compress_rle, encode_rle
from medsam_jax.inference.mask_records import coco_box, mask_box
from medsam_jax.io.files import write_json
from medsam_jax.metrics import lesion_size

COCO_FILE = "coco.json"


def measure(
    labels: Int[np.ndarray, "z h w"], records: list[dict[str, Any]], spacing: Sequence[float]
) -> None:
    """Adds to the record of each object its size, its diameters and, in a picture, COCO's fields.

    Args:
      records: each with its `label`.
      spacing: mm between slices, rows and columns; NaN where unknown. Lengths are then in pixels,
        and there is no volume.
    """
    from scipy import ndimage

    is_known = bool(np.isfinite(spacing[1:]).all())
    unit, sides = ("mm", spacing[1:]) if is_known else ("px", (1.0, 1.0))
    extents = ndimage.find_objects(labels)
    for record in records:
        label = record["label"]
        extent = extents[label - 1] if label <= len(extents) else None
        mask = labels[extent] == label if extent else np.zeros((1, 1, 1), bool)
        size = int(np.count_nonzero(mask))
        if len(labels) == 1:
            record["area_px"] = size
            if is_known:
                record["area_mm2"] = size * float(np.prod(sides))
            runs = compress_rle(encode_rle(labels[0] == label))
            bbox = coco_box(mask_box(labels[0] == label)) if size else [0, 0, 0, 0]
            record |= {"segmentation": runs, "bbox": bbox}
        else:
            record["voxels"] = size
            if np.isfinite(spacing).all():
                record["volume_ml"] = size * float(np.prod(spacing)) / 1000
        measured = lesion_size.measure(mask, (1.0, *sides))
        for name in ("longest", "perpendicular"):
            record[f"{name}_{unit}"] = measured[f"{name}_mm"]


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
        image = {"id": len(images) + 1, "file_name": Path(record["image"]).name}
        images.append(image | {"height": height, "width": width})
        for found in record["objects"]:
            name = found["name"] or "object"
            annotation = {
                "id": len(annotations) + 1,
                "image_id": len(images),
                "category_id": categories.setdefault(name, len(categories) + 1),
                "segmentation": found["segmentation"],
                "bbox": found["bbox"],
                "area": found["area_px"],
                "iscrowd": 0,
                "score": found["predicted_iou"],
            }
            annotations.append(annotation)
    if not images:
        return None
    listed = [{"id": number, "name": name} for name, number in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": listed}
    write_json(output / COCO_FILE, content)
    return output / COCO_FILE


def _read(path: Path) -> dict[str, Any] | None:
    """A record of ours with masks in it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if path.name == COCO_FILE or not isinstance(record, dict) or not record.get("is_picture"):
        return None
    return record
