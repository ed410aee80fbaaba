"""Writes a checkpoint directory with random weights to train from.

Examples:
  python -m weights_converter.init --model unet --output runs/unet/init \
      [--nobox_channel] [--features 16,32,64,128,128 --image_size 128] [--seed 0]
  python -m weights_converter.init --model vit_b --output runs/vit_b/init
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from absl import flags, logging
from flax import nnx

from medsam_jax import cli
from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.errors import UserError
from medsam_jax.io.files import check_writable
from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.sam import Sam
from medsam_jax.models.unet import UNet, UNetConfig
from weights_converter.architectures import ARCHITECTURES

_OUTPUT = flags.DEFINE_string("output", None, "Checkpoint directory to write.")
_MODEL = flags.DEFINE_enum("model", "unet", ["unet", *ARCHITECTURES], "Architecture.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the weights.")
_BOX_CHANNEL = flags.DEFINE_bool("box_channel", True, "U-Net: whether the box is an input channel.")
_FEATURES = flags.DEFINE_list(
    "features", list(map(str, UNetConfig.features)), "U-Net: channels of each stage."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", UNetConfig.image_size, "U-Net: side of the input, to which slices are resized."
)
_OF_UNET = ("box_channel", "features", "image_size")


def unet_config(features: list[str], image_size: int, box_channel: bool) -> UNetConfig:
    """Returns the U-Net configuration for the flags. Raises UserError for sizes that do not fit."""
    try:
        widths = tuple(int(n) for n in features)
        preprocessing = dataclasses.replace(PREPROCESSING["lite"], image_size=image_size)
        return UNetConfig(
            features=widths,
            box_channel=box_channel,
            supervised=min(UNetConfig.supervised, len(widths) - 1),
            image_size=image_size,
            preprocessing=preprocessing,
        )
    except ValueError as error:
        given = f"--features {','.join(features)} --image_size {image_size}"
        raise UserError(f"{given}: {error}; each stage after the first halves the image") from None


def random_model(model: str) -> tuple[nnx.Module, Any]:
    """Returns the model and configuration for `--model`, with random weights from `--seed`."""
    rngs = nnx.Rngs(_SEED.value)
    if model == "unet":
        config = unet_config(_FEATURES.value, _IMAGE_SIZE.value, _BOX_CHANNEL.value)
        return UNet(config, rngs=rngs), config
    given = next((name for name in _OF_UNET if flags.FLAGS[name].present), None)
    if given:
        raise UserError(f"--{given}: is for --model unet; {model} has one form, leave it out")
    config = ARCHITECTURES[model].config()
    return Sam(config, rngs=rngs), config


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it writes
    output = Path(_OUTPUT.value)
    if os.path.lexists(output):
        raise UserError(f"{output}: exists; choose another --output")
    check_writable(output.parent)
    print(f"drawing the weights of {_MODEL.value}", flush=True)
    model, config = random_model(_MODEL.value)
    params = flatten_state(model)
    source = {"source": {"naming": "random", "seed": _SEED.value}, "licence": "Apache-2.0"}
    save_model(_OUTPUT.value, params, config, source)
    count = sum(value.size for value in params.values())
    name = "U-Net" if _MODEL.value == "unet" else _MODEL.value
    print(f"{_OUTPUT.value}: untrained {name} of {count:,} parameters")


if __name__ == "__main__":
    flags.mark_flag_as_required("output")
    cli.run(main)
