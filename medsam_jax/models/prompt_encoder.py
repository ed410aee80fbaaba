"""SAM's prompt encoder (segment_anything/modeling/prompt_encoder.py) for batches of images.

Differences: prompts are [B, P, ...]. The prompts of one call may differ in kind and in number of
points. Missing ones are marked (label -2, `boxes_valid`, `masks_valid`); the decoder's attention
ignores their tokens. In the PyTorch models, padding tokens change the result.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from medsam_jax.data.prompts import PADDING_LABEL
from medsam_jax.models.common import Buffer, Derived, LayerNorm2d, Sequential
from medsam_jax.ops.activation import gelu


class PositionEmbeddingRandom(nnx.Module):
    """Encodes positions as sines and cosines of random, fixed spatial frequencies."""

    def __init__(self, num_pos_feats: int, *, rngs: nnx.Rngs):
        matrix = nnx.initializers.normal(1.0)(rngs.params(), (2, num_pos_feats))
        self.positional_encoding_gaussian_matrix = Buffer(matrix)

    def __call__(self, size: tuple[int, int]) -> Float[Array, "h w c"]:
        """Encodes the pixel centres of a grid of `size` (height, width)."""
        height, width = size
        y, x = (jnp.arange(height) + 0.5) / height, (jnp.arange(width) + 0.5) / width
        return self._encode(jnp.stack(jnp.meshgrid(x, y), axis=-1))

    def forward_with_coords(
        self, coords: Float[Array, "... 2"], image_size: tuple[int, int]
    ) -> Float[Array, "... c"]:
        """Encodes xy positions given in pixels of an image of `image_size` (height, width)."""
        return self._encode(coords / jnp.array([image_size[1], image_size[0]], coords.dtype))

    def _encode(self, coords: Float[Array, "... 2"]) -> Float[Array, "... c"]:
        # Elementwise products are exact also on devices whose matrix products are in bfloat16.
        matrix = self.positional_encoding_gaussian_matrix[...]
        coords = 2 * coords - 1
        angle = 2 * np.pi * (coords[..., :1] * matrix[0] + coords[..., 1:] * matrix[1])
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class PromptEncoder(nnx.Module):
    """Embeds points and boxes as sparse tokens, masks as a dense map; positions are float32."""

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
        *,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2, rngs=rngs)
        self.point_embeddings = nnx.List([nnx.Embed(1, embed_dim, rngs=rngs) for _ in range(4)])
        self.not_a_point_embed = nnx.Embed(1, embed_dim, rngs=rngs)
        conv = {"padding": "VALID", "dtype": dtype, "rngs": rngs}
        self.mask_downscaling = Sequential(
            nnx.Conv(1, mask_in_chans // 4, (2, 2), strides=(2, 2), **conv),
            LayerNorm2d(mask_in_chans // 4, dtype=dtype, rngs=rngs),
            gelu,
            nnx.Conv(mask_in_chans // 4, mask_in_chans, (2, 2), strides=(2, 2), **conv),
            LayerNorm2d(mask_in_chans, dtype=dtype, rngs=rngs),
            gelu,
            nnx.Conv(mask_in_chans, embed_dim, (1, 1), **conv),
        )
        self.no_mask_embed = nnx.Embed(1, embed_dim, rngs=rngs)
        self.image_embedding_size = image_embedding_size
        self.input_image_size = input_image_size
        self.dense_pe = Derived(jnp.zeros(()))
        self.derive()

    def derive(self) -> None:
        """Computes the position encoding of the image embedding's pixels once, for all calls."""
        self.dense_pe.set_value(self.pe_layer(self.image_embedding_size)[None])

    def get_dense_pe(self) -> Float[Array, "1 h w c"]:
        """Returns the position encoding of the image embedding's pixels."""
        return self.dense_pe[...]

    def __call__(
        self,
        points: tuple[Float[Array, "b p n 2"], Int[Array, "b p n"]] | None = None,
        boxes: Float[Array, "b p 4"] | None = None,
        masks: Float[Array, "b p mh mw"] | None = None,
        *,
        boxes_valid: Bool[Array, "b p"] | None = None,
        masks_valid: Bool[Array, "b p"] | None = None,
    ) -> tuple[Float[Array, "b p t c"], Bool[Array, "b p t"] | None, Float[Array, "b2 p2 h2 w2 c"]]:
        """Embeds any mixture of prompts.

        Args:
          points: positions in pixels of the encoder input, xy, and labels: 1 foreground,
            0 background, -1 not a point, -2 padding.
          boxes: x0, y0, x1, y1 in pixels of the encoder input.
          masks: logits of an earlier prediction; their sides are 4 times the embedding's, else
            ValueError is raised.
          boxes_valid, masks_valid: True for prompts that have one; by default all.

        Returns:
          sparse: tokens of points and boxes; T may be 0.
          sparse_valid: True for valid tokens; None if all are valid.
          dense: added to the image embedding; its size is 1 on axes along which it is constant.
        """
        given = [x for x in (*(points or ()), boxes, masks) if x is not None]
        batch, prompts = given[0].shape[:2] if given else (1, 1)
        tokens, valid = [], []
        if points is not None:
            embedded, is_token = self._embed_points(*points, boxes, boxes_valid)
            tokens.append(embedded)
            valid.append(is_token)
        if boxes is not None:
            tokens.append(self._embed_boxes(boxes))
            has_box = jnp.ones((batch, prompts), bool) if boxes_valid is None else boxes_valid
            valid.append(jnp.broadcast_to(has_box[..., None], (batch, prompts, 2)))
        if not tokens:
            empty = jnp.zeros((batch, prompts, 0, self.no_mask_embed.features))
            return empty, None, self._embed_masks(masks, masks_valid)
        all_valid = points is None and boxes_valid is None
        sparse_valid = None if all_valid else jnp.concatenate(valid, axis=2)
        return jnp.concatenate(tokens, axis=2), sparse_valid, self._embed_masks(masks, masks_valid)

    def _embed_points(self, coords, labels, boxes, boxes_valid):
        """Embeds points; points without a box get a "not a point" token, as in SAM."""
        if boxes is None or boxes_valid is not None:
            label = -1 if boxes is None else jnp.where(boxes_valid, PADDING_LABEL, -1)[..., None]
            extra = jnp.broadcast_to(label, (*labels.shape[:2], 1)).astype(labels.dtype)
            labels = jnp.concatenate([labels, extra], axis=2)
            coords = jnp.pad(coords, ((0, 0), (0, 0), (0, 1), (0, 0)))
        position = self.pe_layer.forward_with_coords(coords + 0.5, self.input_image_size)
        label = labels[..., None]
        background, foreground = (e.embedding[0] for e in self.point_embeddings[:2])
        embedded = jnp.select(
            [label == 1, label == 0],
            [position + foreground, position + background],
            jnp.broadcast_to(self.not_a_point_embed.embedding[0], position.shape),
        )
        return embedded, labels != PADDING_LABEL

    def _embed_boxes(self, boxes: Float[Array, "b p 4"]) -> Float[Array, "b p 2 c"]:
        corners = boxes.reshape(*boxes.shape[:2], 2, 2) + 0.5
        position = self.pe_layer.forward_with_coords(corners, self.input_image_size)
        kinds = jnp.concatenate([e.embedding[...] for e in self.point_embeddings[2:]])  # [2, C]
        return position + kinds

    def _embed_masks(self, masks, masks_valid) -> Float[Array, "b2 p2 h2 w2 c"]:
        no_mask = self.no_mask_embed.embedding[...].reshape(1, 1, 1, 1, -1)
        if masks is None:
            return no_mask
        expected = tuple(4 * side for side in self.image_embedding_size)
        if masks.shape[2:] != expected:
            raise ValueError(f"masks are {masks.shape[2:]}, the prompt encoder takes {expected}")
        dense = self.mask_downscaling(masks.reshape(-1, *expected, 1))
        dense = dense.reshape(*masks.shape[:2], *dense.shape[1:])
        if masks_valid is None:
            return dense
        return jnp.where(masks_valid[:, :, None, None, None], dense, no_mask)
