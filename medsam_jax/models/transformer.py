"""SAM's two-way transformer (segment_anything/modeling/transformer.py), batched over prompts.

Differences: tokens are [B, P, T, C] and the image is [B, P or 1, N, C], so that the prompts of an
image can share it. Padding tokens are masked in every attention, so they do not change the result.
The last attention is computed only for tokens whose output is used.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from medsam_jax.models.common import LayerNorm, MLPBlock
from medsam_jax.ops.cross_attention import image_to_tokens, tokens_to_image
from medsam_jax.ops.form import PLAIN

CROSS_DOWNSAMPLE_RATE = 2  # of attention between tokens and image, in every SAM


class Attention(nnx.Module):
    """Multi-head attention whose inner width is `embedding_dim / downsample_rate`."""

    def __init__(
        self, embedding_dim: int, num_heads: int, downsample_rate: int = 1, *, dtype, rngs: nnx.Rngs
    ):
        internal_dim = embedding_dim // downsample_rate
        self.q_proj = nnx.Linear(embedding_dim, internal_dim, dtype=dtype, rngs=rngs)
        self.k_proj = nnx.Linear(embedding_dim, internal_dim, dtype=dtype, rngs=rngs)
        self.v_proj = nnx.Linear(embedding_dim, internal_dim, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(internal_dim, embedding_dim, dtype=dtype, rngs=rngs)
        self.num_heads, self.head_dim = num_heads, internal_dim // num_heads

    def __call__(
        self,
        q: Float[Array, "b p1 t c"],
        k: Float[Array, "b p2 n c"],
        v: Float[Array, "b p2 n c"],
        key_valid: Bool[Array, "b p2 n"] | None = None,
    ) -> Float[Array, "b p t c"]:
        """Applies attention; `p1` and `p2` are equal or 1. Keys not valid get no weight."""
        q = self.separate_heads(self.q_proj(q)).swapaxes(-2, -3)
        k = self.separate_heads(self.k_proj(k)).swapaxes(-2, -3)
        v = self.separate_heads(self.v_proj(v)).swapaxes(-2, -3)
        attn = (q * self.head_dim**-0.5) @ k.swapaxes(-1, -2)  # [B, P, heads, T, N]
        attn = attn.astype(jnp.float32)
        if key_valid is not None:
            attn = jnp.where(key_valid[:, :, None, None, :], attn, -jnp.inf)
        out = jax.nn.softmax(attn).astype(v.dtype) @ v  # [B, P, heads, T, D]
        return self.out_proj(self.recombine_heads(out.swapaxes(-2, -3)))

    def separate_heads(self, x: Float[Array, "b p n c"]) -> Float[Array, "b p n heads d"]:
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)

    def recombine_heads(self, x: Float[Array, "b p n heads d"]) -> Float[Array, "b p n c"]:
        return x.reshape(*x.shape[:-2], -1)


class TwoWayAttentionBlock(nnx.Module):
    """Token self-attention, tokens to image, token MLP, image to tokens."""

    form = PLAIN

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        skip_first_layer_pe: bool,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        cross = (embedding_dim, num_heads, CROSS_DOWNSAMPLE_RATE)
        self.self_attn = Attention(embedding_dim, num_heads, **kw)
        self.norm1 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.cross_attn_token_to_image = Attention(*cross, **kw)
        self.norm2 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, jax.nn.relu, **kw)
        self.norm3 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.norm4 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.cross_attn_image_to_token = Attention(*cross, **kw)
        self.skip_first_layer_pe = skip_first_layer_pe

    def __call__(
        self,
        queries: Float[Array, "b p t c"],
        keys: Float[Array, "b p2 n c"],
        query_pe: Float[Array, "b p t c"],
        key_pe: Float[Array, "1 1 n c"],
        query_valid: Bool[Array, "b p t"] | None,
        image_shared: bool,
    ) -> tuple[Float[Array, "b p t c"], Float[Array, "b p n c"]]:
        """Updates tokens and image; a shared image becomes one image per prompt."""
        # Self attention block
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries, query_valid)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, query_valid)
        queries = self.norm1(queries)

        # Cross attention block, tokens attending to image embedding
        q, k = queries + query_pe, keys + key_pe
        attention = self.cross_attn_token_to_image
        attn_out = tokens_to_image(attention, q, k, keys, image_shared, self.form)
        queries = self.norm2(queries + attn_out)

        # MLP block
        queries = self.norm3(queries + self.mlp(queries))

        # Cross attention block, image embedding attending to tokens
        q, k = queries + query_pe, keys + key_pe
        attn_out = image_to_tokens(
            self.cross_attn_image_to_token, k, q, queries, query_valid, self.form
        )
        return queries, self.norm4(keys + attn_out)


class TwoWayTransformer(nnx.Module):
    """Blocks of two-way attention between prompt tokens and the image, then tokens to image."""

    form = PLAIN

    def __init__(
        self, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int, *, dtype, rngs: nnx.Rngs
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        sizes = (embedding_dim, num_heads, mlp_dim)
        self.layers = nnx.List([TwoWayAttentionBlock(*sizes, i == 0, **kw) for i in range(depth)])
        cross = (embedding_dim, num_heads, CROSS_DOWNSAMPLE_RATE)
        self.final_attn_token_to_image = Attention(*cross, **kw)
        self.norm_final_attn = LayerNorm(embedding_dim, epsilon=1e-5, **kw)

    def __call__(
        self,
        image_embedding: Float[Array, "b p2 n c"],
        image_pe: Float[Array, "1 1 n c"],
        point_embedding: Float[Array, "b p t c"],
        point_valid: Bool[Array, "b p t"] | None,
        num_outputs: int,
        image_shared: bool,
    ) -> tuple[Float[Array, "b p t2 c"], Float[Array, "b p n c"]]:
        """Returns the first `num_outputs` processed tokens and the image of each prompt.

        `image_shared` tells whether other prompts have the same image.
        """
        queries, keys = point_embedding, image_embedding
        for layer in self.layers:
            queries, keys = layer(
                queries, keys, point_embedding, image_pe, point_valid, image_shared
            )
            image_shared = False

        queries, point_embedding = queries[:, :, :num_outputs], point_embedding[:, :, :num_outputs]
        q, k = queries + point_embedding, keys + image_pe
        attn_out = tokens_to_image(self.final_attn_token_to_image, q, k, keys, False, self.form)
        return self.norm_final_attn(queries + attn_out), keys
