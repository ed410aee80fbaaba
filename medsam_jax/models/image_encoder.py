"""SAM's ViT image encoder (segment_anything/modeling/image_encoder.py): vit_b, vit_l and vit_h.

Differences from the PyTorch file: arrays are NHWC. The position tables have the size of the model's
grid; `resize_position_tables` resizes those of a checkpoint with another input size.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from medsam_jax.models.common import LayerNorm, MLPBlock, neck
from medsam_jax.ops.attention import grid_attention
from medsam_jax.ops.form import PLAIN
from medsam_jax.ops.strips import token_wise
from medsam_jax.ops.windows import attend_in_windows


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT encoder; the classmethods return SAM's three."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]  # blocks with attention over the whole image
    patch_size: int = 16
    window_size: int = 14  # tokens per side of the other blocks' windows
    mlp_ratio: float = 4.0
    remat: bool = False  # recompute each block in the backward pass: less memory, more time

    @classmethod
    def vit_b(cls) -> "ViTConfig":
        return cls(768, 12, 12, (2, 5, 8, 11))

    @classmethod
    def vit_l(cls) -> "ViTConfig":
        return cls(1024, 24, 16, (5, 11, 17, 23))

    @classmethod
    def vit_h(cls) -> "ViTConfig":
        return cls(1280, 32, 16, (7, 15, 23, 31))


class PatchEmbed(nnx.Module):
    """Projection of non-overlapping patches to channels."""

    def __init__(self, patch_size: int, embed_dim: int, *, dtype, rngs: nnx.Rngs):
        kw = {"strides": patch_size, "padding": "VALID", "dtype": dtype, "rngs": rngs}
        self.proj = nnx.Conv(3, embed_dim, (patch_size, patch_size), **kw)

    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b h w c"]:
        return self.proj(x)


class Attention(nnx.Module):
    """Multi-head attention over a square grid, with decomposed relative positions."""

    form = PLAIN

    def __init__(self, dim: int, num_heads: int, grid_size: int, *, dtype, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.rel_pos_h = nnx.Param(jnp.zeros((2 * grid_size - 1, dim // num_heads)))
        self.rel_pos_w = nnx.Param(jnp.zeros((2 * grid_size - 1, dim // num_heads)))
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies attention over all of x, which has the size of the grid."""
        tokens = x.reshape(len(x), -1, x.shape[-1])  # [B, H * W, C]
        qkv = self.qkv(tokens).reshape(*tokens.shape[:2], 3, self.num_heads, -1)
        rel_h, rel_w = get_rel_pos(self.rel_pos_h), get_rel_pos(self.rel_pos_w)
        tokens = grid_attention(qkv, rel_h, rel_w, self.form)  # [B, H * W, heads, D]
        return self.proj(tokens.reshape(x.shape))

    def fold(self) -> None:
        """Expands the tables of relative positions, in the compute dtype."""
        for table in (self.rel_pos_h, self.rel_pos_w):
            table.set_value(get_rel_pos(table).astype(self.qkv.dtype or table.dtype))


def get_rel_pos(table: nnx.Param) -> Float[Array, "n n d"]:
    """Returns vectors by (query, key) position from a table [2 * n - 1, d] by their offset.

    A table [n, n, d] of `Attention.fold` is returned as it is.
    """
    if table.ndim == 3:
        return table[...]
    position = np.arange((table.shape[0] + 1) // 2)
    return table[...][position[:, None] - position + position[-1]]


class Block(nnx.Module):
    """Transformer block with attention in windows, or over the whole map if `window_size` is 0."""

    form = PLAIN

    def __init__(
        self, config: ViTConfig, grid_size: int, window_size: int, *, dtype, rngs: nnx.Rngs
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        dim = config.embed_dim
        self.norm1 = LayerNorm(dim, epsilon=1e-6, **kw)
        self.attn = Attention(dim, config.num_heads, window_size or grid_size, **kw)
        self.norm2 = LayerNorm(dim, epsilon=1e-6, **kw)
        self.mlp = MLPBlock(dim, int(dim * config.mlp_ratio), **kw)
        self.window_size = window_size

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shortcut = x
        x = self.norm1(x)
        if self.window_size > 0:
            x = attend_in_windows(self.attn, x, self.window_size, self.form)
        else:
            x = self.attn(x)
        x = shortcut + x
        return token_wise(lambda x: x + self.mlp(self.norm2(x)), x, self.form)


class ImageEncoderViT(nnx.Module):
    """Image encoder: [B, S, S, 3] normalised pixels to [B, S / patch, S / patch, out_chans].

    `dtype` is the compute dtype; the statistics of norms and the softmax stay in float32. Raises
    ValueError for an S that is no multiple of the patch size, and at a call for another S.
    """

    def __init__(
        self, config: ViTConfig, image_size: int, out_chans: int, *, dtype=None, rngs: nnx.Rngs
    ):
        if image_size % config.patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of {config.patch_size}")
        kw = {"dtype": dtype, "rngs": rngs}
        grid_size = image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim, **kw)
        self.pos_embed = nnx.Param(jnp.zeros((1, grid_size, grid_size, config.embed_dim)))
        window_sizes = [config.window_size] * config.depth
        for index in config.global_attn_indexes:
            window_sizes[index] = 0
        self.blocks = nnx.List([Block(config, grid_size, size, **kw) for size in window_sizes])
        self.neck = neck(config.embed_dim, out_chans, **kw)
        self.remat = config.remat
        self.image_size = image_size

    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b h w c"]:
        size = self.image_size
        if x.shape[1:3] != (size, size):
            raise ValueError(f"the image encoder takes {size} x {size} pixels, not {x.shape[1:3]}")
        x = self.patch_embed(x)
        x = x + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = _rematerialised(block, x) if self.remat else block(x)
        return self.neck(x)


def _rematerialised(block: Block, x: Array) -> Array:
    """Recomputes `block(x)` in the backward pass; nnx rejects `nnx.remat` inside a branch."""
    graphdef, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def resize_position_tables(
    params: Mapping[str, np.ndarray],
    config: ViTConfig,
    image_size: int,
    prefix: str = "image_encoder.",
) -> dict[str, np.ndarray]:
    """Resizes the position tables of a checkpoint for another input size.

    The absolute table is resized bilinearly, the tables of the global blocks linearly, both without
    anti-aliasing. PyTorch SAM's `get_rel_pos` does the same at run time, and models fine-tuned from
    SAM (SAMed, SAM-Med2D) when they load. All other arrays stay the same.

    Args:
      params: arrays of a model by dotted path; those of the encoder start with `prefix`.
      image_size: side of the new input in pixels, a multiple of the patch size.
    """
    grid_size = image_size // config.patch_size
    wanted = {f"{prefix}pos_embed": (1, grid_size, grid_size)}
    for index in config.global_attn_indexes:
        wanted[f"{prefix}blocks.{index}.attn.rel_pos_h"] = (2 * grid_size - 1,)
        wanted[f"{prefix}blocks.{index}.attn.rel_pos_w"] = (2 * grid_size - 1,)
    resized = dict(params)
    for path, sides in wanted.items():
        shape = (*sides, params[path].shape[-1])
        if params[path].shape != shape:
            table = jax.image.resize(params[path], shape, "linear", antialias=False)
            resized[path] = np.asarray(table)
    return resized
