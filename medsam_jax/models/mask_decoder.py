"""SAM's mask decoder (segment_anything/modeling/mask_decoder.py), batched over images and prompts.

Differences: [B, P] leading axes instead of `repeat_interleave`; only the masks that are asked for
are multiplied out, and the last attention is spared the tokens that nobody reads; feature maps are
enlarged in name only, and pixels put in order in the masks.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from medsam_jax.models.common import ConvTranspose2x2, LayerNorm2d, Sequential, gelu
from medsam_jax.models.transformer import TwoWayTransformer
from medsam_jax.ops.prompts import for_each_prompt


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
        self.layers = nnx.List(
            [nnx.Linear(*pair, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(dims)]
        )

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nnx.Module):
    """Image embedding and prompt tokens to mask logits and predicted IoU."""

    def __init__(
        self,
        transformer: TwoWayTransformer,
        transformer_dim: int,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        *,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        dim = transformer_dim
        self.num_mask_tokens = num_multimask_outputs + 1
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
        self.output_hypernetworks_mlps = nnx.List(
            [MLP(dim, dim, dim // 8, 3, **kw) for _ in range(self.num_mask_tokens)]
        )
        self.iou_prediction_head = MLP(
            dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth, **kw
        )

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
          image_embeddings: from the image encoder. With one image and sparse of one image, any
            number of prompts share it; nothing is repeated.
          image_pe: from `PromptEncoder.get_dense_pe`.
          sparse, sparse_valid, dense: from the prompt encoder.
          multimask_output: three masks for an ambiguous prompt, or the single one; None for all,
            the single one first, as training needs them.

        Returns:
          low_res_logits and iou_predictions; M is 3, 1 or 4.
        """
        batch, height, width, dim = image_embeddings.shape
        tokens, valid = self._tokens(sparse, sparse_valid)
        image = image_embeddings[:, None] + dense.astype(image_embeddings.dtype)
        image = image.reshape(batch, -1, height * width, dim)  # [B, P or 1, N, C]
        image_pe = image_pe.reshape(1, 1, -1, dim)
        queries = self.transformer.begin(tokens, valid, image, image_pe)
        chosen = {None: slice(None), True: slice(1, None), False: slice(0, 1)}[multimask_output]
        own = {"queries": queries, "tokens": tokens, "valid": valid}
        if image.shape[1] == 1:
            predict = partial(self._predict, image=image, image_pe=image_pe, chosen=chosen)
        else:
            own["image"] = image
            predict = partial(self._predict, image_pe=image_pe, chosen=chosen)
        masks, iou_predictions = for_each_prompt(lambda own: predict(**own), own)
        return self._in_order(masks, height, width), iou_predictions

    def _predict(
        self, queries, tokens, valid, image, image_pe, chosen
    ) -> tuple[Float[Array, "b p pixels m"], Float[Array, "b p m"]]:
        """The masks of some prompts, pixels of the same pixel of the image side by side."""
        mlps = self.output_hypernetworks_mlps[chosen]
        outputs = [0, *range(1, 1 + self.num_mask_tokens)[chosen]]  # for the IoU, then for masks
        tokens, image = self.transformer.finish(queries, tokens, valid, image, image_pe, outputs)
        hyper_in = [mlp(tokens[:, :, 1 + index]) for index, mlp in enumerate(mlps)]
        hyper_in = jnp.stack(hyper_in, axis=2)  # [B, P, M, C / 8]
        first, norm, _, second, _ = self.output_upscaling.layers
        # Rows of channels throughout: XLA:CPU computes anew what is asked for in two shapes, and
        # turns pixels of several axes round for a kernel's gradient.
        pixels = first.blocks(image.reshape(-1, image.shape[-1]))  # [B * P * N, 4, C / 4]
        pixels = second.blocks(gelu(norm(pixels.reshape(-1, norm.num_features))))
        upscaled = gelu(pixels.reshape(*image.shape[:2], -1, pixels.shape[-1]))
        masks = (upscaled @ hyper_in.swapaxes(-1, -2)).astype(jnp.float32)  # [B, P, N * 16, M]
        iou_predictions = self.iou_prediction_head(tokens[:, :, 0]).astype(jnp.float32)
        return masks, iou_predictions[..., chosen]

    def _in_order(
        self, masks: Float[Array, "b p pixels m"], height: int, width: int
    ) -> Float[Array, "b p m rows columns"]:
        """Puts a mask's pixels where two 2 x 2 transposed convolutions put them."""
        masks = masks.reshape(*masks.shape[:2], height, width, 2, 2, 2, 2, -1)
        masks = masks.transpose(0, 1, 8, 2, 4, 6, 3, 5, 7)  # [B, P, M, h, 2, 2, w, 2, 2]
        return masks.reshape(*masks.shape[:3], 4 * height, 4 * width)

    def _tokens(self, sparse, sparse_valid):
        """Puts the output tokens before the prompt's."""
        output = jnp.concatenate([self.iou_token.embedding[...], self.mask_tokens.embedding[...]])
        output = jnp.broadcast_to(output, (*sparse.shape[:2], *output.shape))
        tokens = jnp.concatenate([output, sparse.astype(output.dtype)], axis=2)
        if sparse_valid is not None:
            always = jnp.ones(output.shape[:3], bool)
            sparse_valid = jnp.concatenate([always, sparse_valid], axis=2)
        return tokens, sparse_valid
