"""Recognises the model that a set of tensors belongs to by their names and shapes."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from medsam_jax.errors import UserError
from medsam_jax.io.tensors import LazyTensor
from medsam_jax.models.sam import SamConfig

_VIT = "image_encoder.patch_embed.proj.weight"
_TINY_VIT = "image_encoder.patch_embed.seq.0.c.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A supported model, and a tensor (name, PyTorch shape) that only its checkpoints hold."""

    config: Callable[[], SamConfig]
    tensor: str
    shape: tuple[int, ...]


ARCHITECTURES = {
    "lite_medsam": Architecture(SamConfig.lite_medsam, _TINY_VIT, (32, 3, 1, 1)),
    "mobile_sam": Architecture(SamConfig.mobile_sam, _TINY_VIT, (32, 3, 3, 3)),
    "vit_b": Architecture(SamConfig.vit_b, _VIT, (768, 3, 16, 16)),
    "vit_l": Architecture(SamConfig.vit_l, _VIT, (1024, 3, 16, 16)),
    "vit_h": Architecture(SamConfig.vit_h, _VIT, (1280, 3, 16, 16)),
    "tiny": Architecture(SamConfig.tiny, _TINY_VIT, (4, 3, 1, 1)),
}


def at_size_of(config: SamConfig, tensors: Mapping[str, LazyTensor]) -> SamConfig:
    """Returns `config` with the input size that the ViT position embedding in `tensors` implies.

    Fine-tuned SAM models (SAMed, SAM-Med2D) have SAM's tensors, except for the size of these.
    """
    table = tensors.get("image_encoder.pos_embed")
    if table is None or len(table.shape) != 4 or table.shape[1] != table.shape[2]:
        return config
    size = table.shape[1] * config.encoder.patch_size
    if size == config.image_size or not math.log2(size).is_integer():
        return config
    preprocessing = dataclasses.replace(config.preprocessing, image_size=size)
    return dataclasses.replace(config, image_size=size, preprocessing=preprocessing)


def detect(tensors: Mapping[str, LazyTensor], path: str) -> str:
    """Returns the architecture name of `tensors`, which have segment_anything's names.

    Raises:
      UserError: not a supported architecture, or no image encoder to recognise it by.
    """
    for name, architecture in ARCHITECTURES.items():
        tensor = tensors.get(architecture.tensor)
        if tensor is not None and tensor.shape == architecture.shape:
            return name
    seen = next((name for name in (_VIT, _TINY_VIT) if name in tensors), None)
    what = f"{seen} has shape {tensors[seen].shape}" if seen else "no known image encoder"
    raise UserError(
        f"{path}: the architecture is not one of {', '.join(ARCHITECTURES)} ({what}); name it with "
        "--model to see which tensors differ"
    )
