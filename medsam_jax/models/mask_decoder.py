"""SAM's mask decoder (segment_anything/modeling/mask_decoder.py), batched over images and prompts.

Differences: arrays have [B, P] leading axes, without `repeat_interleave`. Only the requested masks
are computed.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from medsam_jax.models.common import ConvTranspose2x2, LayerNorm2d, Sequential
from medsam_jax.models.transformer import TwoWayTransformer
from medsam_jax.ops.activation import gelu
from medsam_jax.ops.form import PLAIN
from medsam_jax.ops.prompt_loop import one_prompt_after_another
from medsam_jax.ops.upscaling import upscaled_masks


class MLP(nnx.Module):
    """Linear layers with ReLU between."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        dims = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        pairs = itertools.pairwise(dims)
        self.layers = nnx.List([nnx.Linear(*pair, dtype=dtype, rngs=rngs) for pair in pairs])

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nnx.Module):
    """Predicts mask logits and IoU from an image embedding and prompt tokens."""

    form = PLAIN
    num_mask_tokens = 4  # the single mask, and the three for an ambiguous prompt

    def __init__(self, transformer: TwoWayTransformer, dim: int, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.transformer = transformer
        self.iou_token = nnx.Embed(1, dim, rngs=rngs)
        self.mask_tokens = nnx.Embed(self.num_mask_tokens, dim, rngs=rngs)
        self.output_upscaling = Sequential(
            ConvTranspose2x2(dim, dim // 4, **kw),
            LayerNorm2d(dim // 4, **kw),
            gelu,
            ConvTranspose2x2(dim // 4, dim // 8, **kw),
            gelu,
        )
        mlps = [MLP(dim, dim, dim // 8, 3, **kw) for _ in range(self.num_mask_tokens)]
        self.output_hypernetworks_mlps = nnx.List(mlps)
        self.iou_prediction_head = MLP(dim, dim, self.num_mask_tokens, 3, **kw)

    def __call__(
        self,
        image_embeddings: Float[Array, "b h w c"],
        image_pe: Float[Array, "1 h w c"],
        sparse: Float[Array, "b p t c"],
        sparse_valid: Bool[Array, "b p t"] | None,
        dense: Float[Array, "b2 p2 h2 w2 c"],
        multimask_output: bool | None,
    ) -> tuple[Float[Array, "b p m 4*h 4*w"], Float[Array, "b p m"]]:
        """Predicts masks for every prompt of every image.

        Args:
          image_embeddings: from the image encoder; the prompts of an image share its embedding.
          image_pe: from `PromptEncoder.get_dense_pe`.
          sparse, sparse_valid, dense: from the prompt encoder.
          multimask_output: True for three masks, for an ambiguous prompt; False for the single
            mask; None for all four, the single mask first, for training.

        Returns low_res_logits and iou_predictions; M is 3, 1 or 4.
        """
        masks = {None: slice(None), True: slice(1, None), False: slice(0, 1)}[multimask_output]
        image_shared = dense.shape[1] < sparse.shape[1]
        predict = partial(self.predict_masks, image_embeddings, image_pe, masks, image_shared)
        return one_prompt_after_another(predict, (sparse, sparse_valid, dense), self.form)

    def predict_masks(
        self,
        image_embeddings: Float[Array, "b h w c"],
        image_pe: Float[Array, "1 h w c"],
        chosen: slice,
        image_shared: bool,
        sparse: Float[Array, "b p t c"],
        sparse_valid: Bool[Array, "b p t"] | None,
        dense: Float[Array, "b2 p2 h2 w2 c"],
    ) -> tuple[Float[Array, "b p m 4*h 4*w"], Float[Array, "b p m"]]:
        """Predicts the `chosen` of the four masks and their IoU; other arguments as `__call__`.

        `image_shared` tells whether other prompts have the same image and mask prompt.
        """
        # Concatenate output tokens
        output_tokens = jnp.concatenate(
            [self.iou_token.embedding[...], self.mask_tokens.embedding[...]]
        )
        output_tokens = jnp.broadcast_to(output_tokens, (*sparse.shape[:2], *output_tokens.shape))
        tokens = jnp.concatenate([output_tokens, sparse.astype(output_tokens.dtype)], axis=2)
        if sparse_valid is not None:
            always = jnp.ones(output_tokens.shape[:3], bool)
            sparse_valid = jnp.concatenate([always, sparse_valid], axis=2)

        # Add the mask prompt, which the prompts may share
        src = image_embeddings[:, None] + dense.astype(image_embeddings.dtype)
        batch, shared, height, width, dim = src.shape
        src = src.reshape(batch, shared, height * width, dim)  # [B, P or 1, N, C]
        pos_src = image_pe.reshape(1, 1, height * width, dim)

        # Run the transformer
        mask_tokens = range(1, 1 + self.num_mask_tokens)[chosen]
        num_outputs = mask_tokens.stop
        hs, src = self.transformer(src, pos_src, tokens, sparse_valid, num_outputs, image_shared)
        iou_token_out = hs[:, :, 0]
        mask_tokens_out = hs[:, :, mask_tokens.start :]

        # Upscale mask embeddings and predict masks using the mask tokens
        mlps = self.output_hypernetworks_mlps[chosen]
        hyper_in = [mlp(mask_tokens_out[:, :, i]) for i, mlp in enumerate(mlps)]
        hyper_in = jnp.stack(hyper_in, axis=2)  # [B, P, M, C / 8]
        src = src.reshape(*hs.shape[:2], height, width, dim)
        masks = upscaled_masks(self.output_upscaling, src, hyper_in, self.form)

        # Generate mask quality predictions
        iou_pred = self.iou_prediction_head(iou_token_out)[..., chosen]
        return masks.astype(jnp.float32), iou_pred.astype(jnp.float32)
