"""2D U-Net after nnU-Net's plain architecture, the specialist baseline for promptable models.

It follows Isensee et al. 2021 (nnU-Net). Each stage has two 3x3 convolutions with instance norm and
leaky ReLU. Strided convolutions downsample, transposed convolutions upsample. The number of
features doubles per stage, up to 512. The lower resolutions of the decoder have logits for deep
supervision. Differences: there is one class. The prompt's box can be an input channel, for a fair
comparison with models that get the box. Inputs are scaled by the preprocessing contract; instance
norm makes this equivalent to z-scores.

It has the methods of `Sam` (`encode`, `decode`), so that training and evaluation accept either.
`python -m weights_converter.init --model unet` writes untrained weights to start from.

Without the box channel the model cannot distinguish objects. It then segments all pixels of a
label, so the data must have one object label per slice. Training checks this.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from medsam_jax.data.preprocess import encoder_input
from medsam_jax.data.recipes import PREPROCESSING, Preprocessing
from medsam_jax.errors import UserError
from medsam_jax.models.common import ConvTranspose2x2, Sequential

_INIT = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")  # He, as in nnU-Net


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture and preprocessing of a `UNet`; stored with every checkpoint."""

    name: str = "unet"
    features: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512)  # per stage; each halves the size
    box_channel: bool = True  # the box is a binary fourth input channel
    supervised: int = 4  # decoder stages with logits, the last one included
    image_size: int = 256  # side of the square input, pixels
    preprocessing: Preprocessing = PREPROCESSING["lite"]
    dtype: str = "float32"  # compute dtype; parameters stay float32

    def __post_init__(self) -> None:
        stride = 2 ** (len(self.features) - 1)
        if self.image_size % stride:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {stride}")
        if not 1 <= self.supervised < len(self.features):
            raise ValueError(f"supervised {self.supervised} of {len(self.features) - 1} stages")

    @classmethod
    def tiny(cls) -> "UNetConfig":
        """Returns a small configuration for tests."""
        preprocessing = dataclasses.replace(PREPROCESSING["lite"], image_size=32)
        return cls("tiny_unet", (4, 8, 8), True, 2, 32, preprocessing)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, for model.json."""
        return dataclasses.asdict(self) | {"preprocessing": self.preprocessing.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UNetConfig":
        """Returns the configuration for the result of `to_dict`."""
        preprocessing = Preprocessing.from_dict(values["preprocessing"])
        features = tuple(values["features"])
        return cls(**values | {"features": features, "preprocessing": preprocessing})


class UNet(nnx.Module):
    """U-Net; without the box channel it ignores the prompt and segments the whole slice."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        features, kw = config.features, {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        inputs = (3 + config.box_channel, *features[:-1])
        strides = (1, *[2] * (len(features) - 1))
        stages = zip(inputs, features, strides, strict=True)
        self.encoder = Sequential(*(Stage(*sizes, **kw) for sizes in stages))
        upwards = features[::-1]
        upper = upwards[1:]  # of the skip connections
        steps = itertools.pairwise(upwards)
        self.upsampling = Sequential(*(ConvTranspose2x2(*sizes, **kw) for sizes in steps))
        self.decoder = Sequential(*(Stage(2 * n, n, 1, **kw) for n in upper))
        heads = upper[-config.supervised :]
        self.heads = Sequential(*(nnx.Conv(n, 1, (1, 1), **kw) for n in heads))

    def encode(
        self, images: UInt8[Array, "b s s 3"], valid_shape: Int[Array, "b 2"]
    ) -> Float[Array, "b n n 3"]:
        """Returns the normalised pixels, because this model has no image embedding."""
        return encoder_input(images, valid_shape, self.config.preprocessing)

    def decode(
        self,
        image_embeddings: Float[Array, "b s s 3"],
        points: Any = None,
        boxes: Float[Array, "b p 4"] | None = None,
        masks: Any = None,
        multimask_output: bool = False,
        **valid: Any,
    ) -> tuple[Float[Array, "b p 1 s s"], Float[Array, "b p 1"]]:
        """Returns logits at full size for each box, and NaN as the predicted IoU.

        Raises:
          UserError: the model does not support the prompt.
        """
        prompts = {"points": points, "box": boxes, "mask_input": masks}
        given = [name for name, prompt in prompts.items() if prompt is not None]
        if masks is not None or (self.config.box_channel and given != ["box"]):
            kinds = " and ".join(given)
            raise UserError(f"prompt: {kinds} given; a U-Net takes a box and nothing else")
        logits = self.supervised_logits(image_embeddings, points, boxes)[-1]
        return logits, jnp.full(logits.shape[:3], jnp.nan)

    def supervised_logits(
        self,
        pixels: Float[Array, "b s s 3"],
        points: Any = None,
        boxes: Float[Array, "b p 4"] | None = None,
    ) -> list[Float[Array, "b p 1 h w"]]:
        """Returns the logits of the supervised decoder stages, from the smallest to full size."""
        batch, size = pixels.shape[:2]
        prompt = boxes if boxes is not None else points[0] if points is not None else None
        count = 1 if prompt is None else prompt.shape[1]
        pixels = jnp.repeat(pixels, count, axis=0)  # [B * P, S, S, 3]
        if self.config.box_channel:
            inside = box_mask(boxes.reshape(-1, 4), size)
            pixels = jnp.concatenate([pixels, inside[..., None]], axis=-1)
        logits = [one[..., 0].astype(jnp.float32) for one in self._forward(pixels)]
        return [one.reshape(batch, count, 1, *one.shape[1:]) for one in logits]

    def _forward(self, x: Float[Array, "n s s c"]) -> list[Float[Array, "n h w 1"]]:
        skips, logits = [], []
        for stage in self.encoder.layers:
            x = stage(x)
            skips.append(x)
        skips.pop()
        heads = [None] * (self.decoder.length - self.heads.length) + self.heads.layers
        steps = zip(self.upsampling.layers, self.decoder.layers, heads, strict=True)
        for enlarge, stage, head in steps:
            x = stage(jnp.concatenate([enlarge(x), skips.pop()], axis=-1))
            if head is not None:
                logits.append(head(x))
        return logits


class Stage(nnx.Module):
    """Two convolutions with instance norm and leaky ReLU; the first halves the size if strided."""

    def __init__(self, n_in: int, n_out: int, stride: int, *, dtype=None, rngs: nnx.Rngs):
        kw = {"kernel_init": _INIT, "padding": 1, "dtype": dtype, "rngs": rngs}
        self.conv1 = nnx.Conv(n_in, n_out, (3, 3), strides=stride, **kw)
        self.norm1 = InstanceNorm(n_out)
        self.conv2 = nnx.Conv(n_out, n_out, (3, 3), **kw)
        self.norm2 = InstanceNorm(n_out)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        x = jax.nn.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return jax.nn.leaky_relu(self.norm2(self.conv2(x)), 0.01)


class InstanceNorm(nnx.Module):
    """Instance norm over rows and columns, in float32; epsilon 1e-5."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        wide = x.astype(jnp.float32)
        mean = wide.mean(axis=(1, 2), keepdims=True)
        variance = jnp.square(wide - mean).mean(axis=(1, 2), keepdims=True)
        scale = jax.lax.rsqrt(variance + 1e-5) * self.scale[...]
        return ((wide - mean) * scale + self.bias[...]).astype(x.dtype)


def box_mask(boxes: Float[Array, "n 4"], size: int) -> Float[Array, "n s s"]:
    """Returns 1 inside each box (x_min, y_min, x_max, y_max; all sides included), 0 outside."""
    position = jnp.arange(size)
    x_min, y_min, x_max, y_max = (boxes[:, i, None] for i in range(4))
    rows = (position >= y_min) & (position <= y_max)
    columns = (position >= x_min) & (position <= x_max)
    return (rows[:, :, None] & columns[:, None, :]).astype(jnp.float32)
