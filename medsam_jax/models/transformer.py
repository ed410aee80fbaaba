"""SAM's two-way transformer (segment_anything/modeling/transformer.py), batched over prompts.

Differences: tokens are [B, P, T, C] and the image is [B, P or 1, N, C], so that whatever the image
side computes before it differs between the prompts of an image is computed once; padding tokens are
masked out of every attention, so they change nothing; with few tokens, pixels are not projected
(`ops/cross_attention.py`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from medsam_jax.models.common import LayerNorm, MLPBlock
from medsam_jax.ops.cross_attention import pixels_to_tokens, tokens_are_few, tokens_to_pixels


class Attention(nnx.Module):
    """Multi-head attention whose inner width is `embedding_dim / downsample_rate`."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        downsample_rate: int = 1,
        *,
        dtype,
        rngs: nnx.Rngs,
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
        """Attends; `p1` and `p2` are equal or 1. Keys that are not valid get no weight."""
        q = self._heads(self.q_proj(q)).swapaxes(-2, -3)
        k = self._heads(self.k_proj(k)).swapaxes(-2, -3)
        v = self._heads(self.v_proj(v)).swapaxes(-2, -3)
        scores = (q * self.head_dim**-0.5) @ k.swapaxes(-1, -2)  # [B, P, heads, T, N]
        scores = scores.astype(jnp.float32)
        if key_valid is not None:
            scores = jnp.where(key_valid[:, :, None, None, :], scores, -jnp.inf)
        out = jax.nn.softmax(scores).astype(v.dtype) @ v  # [B, P, heads, T, D]
        return self._project_out(out.swapaxes(-2, -3))

    def tokens_to_image(
        self,
        q: Float[Array, "b p t c"],
        k: Float[Array, "b p2 n c"],
        v: Float[Array, "b p2 n c"],
    ) -> Float[Array, "b p t c"]:
        """As a call, for the tokens of prompts as queries; an image that prompts share is projected
        once for all."""
        if k.shape[1] < q.shape[1] or not tokens_are_few(q.shape[2], self.head_dim):
            return self(q, k, v)
        q = self._heads(self.q_proj(q))
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        out = tokens_to_pixels(q, k, v, self._kernel(self.k_proj), self._kernel(self.v_proj))
        return self._project_out(out + self._bias(self.v_proj))

    def image_to_tokens(
        self,
        q: Float[Array, "b p2 n c"],
        k: Float[Array, "b p t c"],
        v: Float[Array, "b p t c"],
        key_valid: Bool[Array, "b p t"] | None,
    ) -> Float[Array, "b p n c"]:
        """As a call, for the pixels of the image as queries."""
        if not tokens_are_few(k.shape[2], self.head_dim):
            return self(q, k, v, key_valid)
        k, v = self._heads(self.k_proj(k)), self._heads(self.v_proj(v))
        return pixels_to_tokens(
            q.astype(k.dtype),
            k,
            v,
            self._kernel(self.q_proj),
            self._bias(self.q_proj),
            self._kernel(self.out_proj, axis=0),
            self.out_proj.bias[...].astype(k.dtype),
            key_valid,
        )

    def _heads(self, x: Float[Array, "b p n c"]) -> Float[Array, "b p n heads d"]:
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)

    def _kernel(self, linear: nnx.Linear, axis: int = 1) -> Array:
        """The kernel in the computation's type, its inner axis split into heads."""
        kernel = linear.kernel[...].astype(linear.dtype)
        inner = (self.num_heads, self.head_dim)
        return kernel.reshape(*kernel.shape[:axis], *inner, *kernel.shape[axis + 1 :])

    def _bias(self, linear: nnx.Linear) -> Float[Array, "heads d"]:
        return linear.bias[...].astype(linear.dtype).reshape(self.num_heads, self.head_dim)

    def _project_out(self, out: Float[Array, "b p t heads d"]) -> Float[Array, "b p t c"]:
        return self.out_proj(out.reshape(*out.shape[:-2], -1))


class TwoWayAttentionBlock(nnx.Module):
    """Token self-attention, tokens to image, token MLP, image to tokens."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int = 2,
        skip_first_layer_pe: bool = False,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        cross = (embedding_dim, num_heads, attention_downsample_rate)
        self.self_attn = Attention(embedding_dim, num_heads, **kw)
        self.norm1 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.cross_attn_token_to_image = Attention(*cross, **kw)
        self.norm2 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, jax.nn.relu, **kw)
        self.norm3 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.norm4 = LayerNorm(embedding_dim, epsilon=1e-5, **kw)
        self.cross_attn_image_to_token = Attention(*cross, **kw)
        self.skip_first_layer_pe = skip_first_layer_pe

    def update_tokens(
        self,
        queries: Float[Array, "b p t c"],
        query_pe: Float[Array, "b p t c"],
        query_valid: Bool[Array, "b p t"] | None,
        keys: Float[Array, "b p2 n c"],
        key_pe: Float[Array, "1 1 n c"],
    ) -> Float[Array, "b p t c"]:
        """The first three of the four; `p2` may be 1."""
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries, query_valid)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, query_valid)
        queries = self.norm1(queries)
        attended = self.cross_attn_token_to_image.tokens_to_image(
            queries + query_pe, keys + key_pe, keys
        )
        queries = self.norm2(queries + attended)
        return self.norm3(queries + self.mlp(queries))

    def update_image(
        self,
        queries: Float[Array, "b p t c"],
        query_pe: Float[Array, "b p t c"],
        query_valid: Bool[Array, "b p t"] | None,
        keys: Float[Array, "b p2 n c"],
        key_pe: Float[Array, "1 1 n c"],
    ) -> Float[Array, "b p n c"]:
        """The last of the four: from here on every prompt has an image of its own."""
        attended = self.cross_attn_image_to_token.image_to_tokens(
            keys + key_pe, queries + query_pe, queries, query_valid
        )
        return self.norm4(keys + attended)


class TwoWayTransformer(nnx.Module):
    """Blocks of two-way attention between prompt tokens and the image, then tokens to image."""

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int = 2,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List(
            [
                TwoWayAttentionBlock(
                    embedding_dim,
                    num_heads,
                    mlp_dim,
                    attention_downsample_rate,
                    skip_first_layer_pe=index == 0,
                    dtype=dtype,
                    rngs=rngs,
                )
                for index in range(depth)
            ]
        )
        self.final_attn_token_to_image = Attention(
            embedding_dim, num_heads, attention_downsample_rate, dtype=dtype, rngs=rngs
        )
        self.norm_final_attn = LayerNorm(embedding_dim, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def begin(
        self,
        tokens: Float[Array, "b p t c"],
        valid: Bool[Array, "b p t"] | None,
        image: Float[Array, "b p2 n c"],
        image_pe: Float[Array, "1 1 n c"],
    ) -> Float[Array, "b p t c"]:
        """The queries as they are when the first layer is about to change the image."""
        return self.layers[0].update_tokens(tokens, tokens, valid, image, image_pe)

    def finish(
        self,
        queries: Float[Array, "b p t c"],
        tokens: Float[Array, "b p t c"],
        valid: Bool[Array, "b p t"] | None,
        image: Float[Array, "b p2 n c"],
        image_pe: Float[Array, "1 1 n c"],
        outputs: Sequence[int],
    ) -> tuple[Float[Array, "b p t2 c"], Float[Array, "b p n c"]]:
        """From the queries of `begin` to the processed tokens and image, one per prompt.

        Args:
          outputs: which tokens to return; the last attention is spared the others.
        """
        image = self.layers[0].update_image(queries, tokens, valid, image, image_pe)
        for layer in self.layers[1:]:
            queries = layer.update_tokens(queries, tokens, valid, image, image_pe)
            image = layer.update_image(queries, tokens, valid, image, image_pe)
        queries, tokens = (x[:, :, np.asarray(outputs)] for x in (queries, tokens))
        queries = queries + self.final_attn_token_to_image.tokens_to_image(
            queries + tokens, image + image_pe, image
        )
        return self.norm_final_attn(queries), image
