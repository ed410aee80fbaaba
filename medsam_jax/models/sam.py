"""SAM: image encoder, prompt encoder and mask decoder, and the published sizes of it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from medsam_jax.data.preprocess import encoder_input
from medsam_jax.data.recipes import PREPROCESSING, Preprocessing
from medsam_jax.models.image_encoder import ImageEncoderViT, ViTConfig
from medsam_jax.models.mask_decoder import MaskDecoder
from medsam_jax.models.prompt_encoder import PromptEncoder
from medsam_jax.models.tiny_vit import TinyViT, TinyViTConfig
from medsam_jax.models.transformer import TwoWayTransformer
from medsam_jax.ops.form import PLAIN
from medsam_jax.ops.strips import image_by_image

# `encoder.kind` of model.json -> the encoder's configuration, with the `patch_size` of its
# embedding, and its module: (config, image_size, out_chans, *, dtype, rngs) to a module from
# normalised pixels [B, S, S, 3] to [B, S / patch_size, S / patch_size, out_chans].
ENCODERS: dict[str, tuple[type, type[nnx.Module]]] = {
    "vit": (ViTConfig, ImageEncoderViT),
    "tiny_vit": (TinyViTConfig, TinyViT),
}


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Everything that builds a `Sam` and tells how to feed it; stored with every checkpoint."""

    name: str
    encoder: Any  # a configuration of `ENCODERS`
    image_size: int  # side of the square encoder input, pixels
    preprocessing: Preprocessing  # how a scan becomes that input
    embed_dim: int = 256  # channels of image embedding and prompt tokens
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    dtype: str = "float32"  # of the computation; parameters stay float32
    automatic_prompts: str = ""  # of automatic masks: "points", "boxes", or "": by the recipe

    @classmethod
    def lite_medsam(cls) -> "SamConfig":
        """LiteMedSAM: TinyViT at 256 x 256."""
        return cls("lite_medsam", TinyViTConfig(), 256, PREPROCESSING["lite"])

    @classmethod
    def mobile_sam(cls) -> "SamConfig":
        """MobileSAM: the same TinyViT at 1024 x 1024, behind a patch embedding of stride 4."""
        encoder = TinyViTConfig(patch_embed_stride=2)
        return cls("mobile_sam", encoder, 1024, PREPROCESSING["sam"])

    @classmethod
    def vit_b(cls) -> "SamConfig":
        """SAM ViT-B at 1024 x 1024; so are MedSAM's weights, with a preprocessing of their own."""
        return cls("vit_b", ViTConfig.vit_b(), 1024, PREPROCESSING["sam"])

    @classmethod
    def vit_l(cls) -> "SamConfig":
        """SAM ViT-L at 1024 x 1024."""
        return cls("vit_l", ViTConfig.vit_l(), 1024, PREPROCESSING["sam"])

    @classmethod
    def vit_h(cls) -> "SamConfig":
        """SAM ViT-H at 1024 x 1024."""
        return cls("vit_h", ViTConfig.vit_h(), 1024, PREPROCESSING["sam"])

    @classmethod
    def tiny(cls) -> "SamConfig":
        """LiteMedSAM's shape in miniature, random weights, for tests."""
        encoder = TinyViTConfig((8, 8, 16, 16), (1, 1, 1, 1), (1, 2, 2, 2), (7, 7, 14, 7))
        preprocessing = dataclasses.replace(PREPROCESSING["lite"], image_size=64)
        sizes = {"embed_dim": 32, "decoder_num_heads": 2, "decoder_mlp_dim": 64}
        return cls("tiny", encoder, 64, preprocessing, **sizes)

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding, a quarter of the low-resolution masks' side."""
        return self.image_size // self.encoder.patch_size

    @property
    def encoder_kind(self) -> str:
        """Key of `ENCODERS`."""
        return next(kind for kind, (config, _) in ENCODERS.items() if type(self.encoder) is config)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, for model.json."""
        return dataclasses.asdict(self) | {
            "encoder": {"kind": self.encoder_kind, **dataclasses.asdict(self.encoder)},
            "preprocessing": self.preprocessing.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SamConfig":
        """The configuration that `to_dict` describes. Raises KeyError for an unknown encoder."""
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in values["encoder"].items()}
        encoder_config, _ = ENCODERS[sizes.pop("kind")]
        preprocessing = Preprocessing.from_dict(values["preprocessing"])
        return cls(**values | {"encoder": encoder_config(**sizes), "preprocessing": preprocessing})


class Sam(nnx.Module):
    """Segment Anything, with the attribute paths of segment_anything's `Sam`."""

    form = PLAIN

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        dim, size = config.embed_dim, config.embedding_size
        kw = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.config = config
        _, image_encoder = ENCODERS[config.encoder_kind]
        self.image_encoder = image_encoder(config.encoder, config.image_size, dim, **kw)
        sizes = (size, size), (config.image_size, config.image_size)
        self.prompt_encoder = PromptEncoder(dim, *sizes, config.mask_in_chans, **kw)
        heads, mlp_dim = config.decoder_num_heads, config.decoder_mlp_dim
        transformer = TwoWayTransformer(config.decoder_depth, dim, heads, mlp_dim, **kw)
        self.mask_decoder = MaskDecoder(transformer, dim, **kw)

    def encode(
        self, images: UInt8[Array, "b s s 3"], valid_shape: Int[Array, "b 2"]
    ) -> Float[Array, "b h w c"]:
        """Embeddings of slices on the recipe's grid, prepared as the checkpoint's contract says.

        `images` are padded at the bottom and right; `valid_shape` is height and width before that.
        """
        pixels = encoder_input(images, valid_shape, self.config.preprocessing)
        return image_by_image(self.image_encoder, pixels, self.form)

    def decode(
        self,
        image_embeddings: Float[Array, "b h w c"],
        points: tuple[Float[Array, "b p n 2"], Int[Array, "b p n"]] | None = None,
        boxes: Float[Array, "b p 4"] | None = None,
        masks: Float[Array, "b p mh mw"] | None = None,
        multimask_output: bool | None = False,
        **valid: Bool[Array, "b p"],
    ) -> tuple[Float[Array, "b p m mh mw"], Float[Array, "b p m"]]:
        """Mask logits and predicted IoU for any number of prompts on each image of `encode`.

        For the prompts see `PromptEncoder`, for `multimask_output` see `MaskDecoder`.
        """
        sparse, sparse_valid, dense = self.prompt_encoder(points, boxes, masks, **valid)
        prompts = self.prompt_encoder.get_dense_pe(), sparse, sparse_valid, dense
        return self.mask_decoder(image_embeddings, *prompts, multimask_output)
