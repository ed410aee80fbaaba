"""The contract of a checkpoint in a JSON beside a file of weights, whose format cannot carry it.

`tuned.pth.json` has the fields of a checkpoint directory's model.json (architecture, preprocessing,
mask threshold, automatic prompts, CT windows, licence, training facts) and the SHA-256 of
`tuned.pth`, which it was written with.
"""

import json
import os
from pathlib import Path
from typing import Any

from medsam_jax.errors import UserError
from medsam_jax.io.files import sha256_of, write_json
from medsam_jax.models import checkpoint
from medsam_jax.models.sam import SamConfig

_NOT_KEPT = ("format_version", "architecture", "created_by", "source", "sha256")


def beside(path: str | os.PathLike) -> Path:
    """Returns the path of the JSON that belongs to a file of weights."""
    return Path(f"{path}.json")


def write(path: Path, weights: Path, config: SamConfig, metadata: dict[str, Any]) -> None:
    """Writes the contract of `weights`, a complete file that will be at `path`."""
    content = checkpoint.description(config, metadata) | {"sha256": sha256_of(weights)}
    write_json(beside(path), content)


def read(path: str, sha256: str) -> tuple[SamConfig, dict[str, Any]] | None:
    """Returns config and metadata (licence, training facts) of a file; None without a JSON.

    The licence is `unknown` where the file is not the one that the JSON was written with.

    Raises:
      UserError: a JSON that is damaged or describes no SAM.
    """
    place = beside(path)
    try:
        fields = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: cannot be read ({error}); write it again or move it") from None
    if not isinstance(fields, dict) or fields.get("format_version") != checkpoint.FORMAT_VERSION:
        raise UserError(
            f"{place}: not the contract of {Path(path).name} (format_version "
            f"{checkpoint.FORMAT_VERSION}); move it away, or convert the checkpoint again"
        )
    config = checkpoint.config_of(fields, str(place))
    if not isinstance(config, SamConfig):
        raise UserError(f"{place}: describes a {type(config).__name__}, a file holds a SAM")
    kept = metadata_of(fields)
    if fields.get("sha256") != sha256:
        kept |= {"licence": "unknown"}
    return config, kept


def metadata_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of model.json that travel with weights: licence and training facts."""
    return {key: value for key, value in fields.items() if key not in _NOT_KEPT}


def lines(config: SamConfig) -> dict[str, str]:
    """Returns the contract for a reader: everything that the tensors do not tell."""
    preprocessing = config.preprocessing
    windows = ", ".join(preprocessing.ct_windows)
    by_recipe = "points" if preprocessing.recipe == "sam" else "boxes"
    return {
        "preprocessing": f"recipe {preprocessing.recipe}, {preprocessing.normalisation}, CT in "
        f"{preprocessing.ct_window()}",
        "pixel mean, deviation": f"{preprocessing.pixel_mean}, {preprocessing.pixel_std}"
        if preprocessing.normalisation == "mean_std"
        else "not used",
        "CT windows trained on": windows or "not known",
        "mask threshold": f"{preprocessing.mask_threshold:g} on the logits, interpolated as "
        f"{preprocessing.upsample}",
        "automatic prompts": config.automatic_prompts or f"{by_recipe}, by the recipe",
        "computation": config.dtype,
    }
