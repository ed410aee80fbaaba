"""Models by name or directory; known weights are fetched and converted on first use."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from medsam_jax.errors import UserError
from medsam_jax.models.checkpoint import build_model, read_config, read_params
from medsam_jax.models.image_encoder import ViTConfig, resize_position_tables
from medsam_jax.models.unet import UNetConfig


def load_model(name_or_dir: str | os.PathLike, image_size: int | None = None) -> nnx.Module:
    """Builds the model of a checkpoint directory, or of known weights by name.

    Args:
      name_or_dir: a directory, or a name of `weights_converter.registry` such as "lite_medsam",
        which is fetched, verified, converted and kept in `$MEDSAM_JAX_CACHE` or
        `~/.cache/medsam_jax`.
      image_size: another side of the square input than the checkpoint's, pixels: a multiple of a
        SAM's patch, whose ViT's position tables are resized as PyTorch does, or of the factor by
        which a U-Net, which has no parameter of that size, reduces its input.

    Returns:
      The `Sam` (or `UNet`), float32, with its configuration as `.config`.

    Raises:
      UserError: unknown name, failed or wrong download, a directory that does not hold what its
        model.json says, or an impossible `image_size`.
    """
    directory = resolve(name_or_dir)
    config, params = read_config(directory), read_params(directory)
    if image_size not in (None, config.image_size):
        config, params = _at_size(config, params, image_size)
    return build_model(config, params, str(directory))


def _at_size(
    config: Any, params: dict[str, np.ndarray], image_size: int
) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns a model's configuration and parameters for another input size."""
    is_unet = isinstance(config, UNetConfig)
    step = 2 ** (len(config.features) - 1) if is_unet else config.encoder.patch_size
    if image_size <= 0 or image_size % step:
        part = "the U-Net's reduction" if is_unet else "the patch"
        raise UserError(f"image_size: {image_size} is no multiple of {part}, {step} pixels")
    if not is_unet and isinstance(config.encoder, ViTConfig):
        params = resize_position_tables(params, config.encoder, image_size)
    contract = dataclasses.replace(config.preprocessing, image_size=image_size)
    return dataclasses.replace(config, image_size=image_size, preprocessing=contract), params


def resolve(name_or_dir: str | os.PathLike) -> Path:
    """The checkpoint directory, fetched and converted first for a known name.

    A name counts only where no such directory exists. Raises UserError as `load_model`.
    """
    path = Path(name_or_dir)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UserError(
            f"{path}: a file; make a checkpoint directory of it with `python -m "
            f"weights_converter.convert --input {path} --output DIRECTORY`"
        )
    from weights_converter.known import converted_directory

    return converted_directory(os.fspath(name_or_dir))
