"""TinyViT image encoder of LiteMedSAM (tiny_vit_sam.py): 256 x 256 in, 64 x 64 x 256 out.

Differences from the PyTorch file: NHWC throughout; BatchNorm is folded into its convolution; on a
CPU a block works strip by strip (ops/strips.py); no stochastic depth (its rate is 0 in LiteMedSAM).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from medsam_jax.models.common import (
    Conv2dBN,
    LayerNorm,
    Sequential,
    gelu,
    neck,
)
from medsam_jax.ops.depthwise import depthwise_of_strip
from medsam_jax.ops.strips import (
    join_rows,
    map_images,
    map_strips,
    neighbour_rows,
    on_cpu,
    rows_of,
    split_rows,
)
from medsam_jax.ops.windows import attend_in_windows, map_window_rows

# What a strip holds on a CPU; small maps are one strip. Half or double are as fast.
_HIDDEN_BYTES = 1 << 22  # hidden features of convolutions: 16 rows of LiteMedSAM's first blocks
_WINDOW_BYTES = 3 << 20  # input of window attention, or one row of windows
_MLP_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class TinyViTConfig:
    """Sizes of a TinyViT; the defaults are LiteMedSAM's."""

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)  # stage 0 has no attention
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    strides: tuple[int, ...] = (2, 2, 1)  # of the patch merging after stages 0, 1, 2
    patch_embed_stride: int = 1  # of each of its two convolutions; 2 (and 3x3 kernels) in MobileSAM
    mlp_ratio: float = 4.0
    mbconv_expand_ratio: float = 4.0

    @property
    def patch_size(self) -> int:
        """Input pixels per embedding pixel."""
        return int(np.prod(self.strides)) * self.patch_embed_stride**2


class PatchEmbed(nnx.Module):
    """Pixels to channels by two convolutions: 1x1 at LiteMedSAM's full resolution, or 3x3."""

    def __init__(self, embed_dim: int, stride: int, *, dtype, rngs: nnx.Rngs):
        kernel_size = 1 if stride == 1 else 3
        self.seq = Sequential(
            Conv2dBN(3, embed_dim // 2, kernel_size, stride, dtype=dtype, rngs=rngs),
            gelu,
            Conv2dBN(embed_dim // 2, embed_dim, kernel_size, stride, dtype=dtype, rngs=rngs),
        )

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h w c"]:
        return self.seq(x)


def _expand_and_mix(x: Array, expand: Conv2dBN, mix: Conv2dBN, finish: Callable) -> Array:
    """`finish(gelu(mix(gelu(expand(x)))), x)`: 1x1 then depthwise 3x3, the way the device likes it.

    On a CPU no more of the many hidden channels exists at a time than a strip of rows has.
    """
    if not on_cpu():
        return finish(gelu(mix(gelu(expand(x)))), x)
    dtype = expand.dtype or x.dtype
    kernel, bias = expand.folded(dtype)
    mix_kernel, mix_bias = mix.folded(dtype)
    strips = split_rows(x.astype(dtype), rows_of(_HIDDEN_BYTES, x.shape[2], bias.size))
    count, height = strips.shape[1:3]
    # The rows beyond the image are zero before `mix`, not what `expand` makes of zeros.
    inside = np.ones((count, height + 2), np.float32)
    inside[0, 0] = inside[-1, -1] = 0
    biases = jnp.asarray(inside, dtype)[None, ..., None] * bias  # [1, n, r + 2, hidden]

    def strip(inputs: tuple[Array, ...]) -> Array:
        rows, above, below, bias = inputs
        x = jnp.concatenate([above, rows, below], axis=1)
        hidden = gelu(x @ kernel[0, 0] + bias[:, :, None])
        hidden = gelu(depthwise_of_strip(hidden, mix_kernel, mix.stride) + mix_bias)
        return finish(hidden, rows)

    return join_rows(map_strips(strip, (strips, *neighbour_rows(strips), biases)))


class MBConv(nnx.Module):
    """Inverted bottleneck: expand, depthwise 3x3, project, add."""

    def __init__(self, dim: int, expand_ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = int(dim * expand_ratio)
        self.conv1 = Conv2dBN(dim, hidden, dtype=dtype, rngs=rngs)
        self.conv2 = Conv2dBN(hidden, hidden, 3, groups=hidden, dtype=dtype, rngs=rngs)
        self.conv3 = Conv2dBN(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        def finish(hidden, x):
            return gelu(self.conv3(hidden) + x)

        return _expand_and_mix(x, self.conv1, self.conv2, finish)


class PatchMerging(nnx.Module):
    """To `out_dim` channels and a grid `stride` times coarser, through a depthwise convolution."""

    def __init__(self, dim: int, out_dim: int, stride: int, *, dtype, rngs: nnx.Rngs):
        self.conv1 = Conv2dBN(dim, out_dim, dtype=dtype, rngs=rngs)
        self.conv2 = Conv2dBN(out_dim, out_dim, 3, stride, out_dim, dtype=dtype, rngs=rngs)
        self.conv3 = Conv2dBN(out_dim, out_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return _expand_and_mix(x, self.conv1, self.conv2, lambda hidden, _: self.conv3(hidden))


class Mlp(nnx.Module):
    def __init__(self, dim: int, hidden_dim: int, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return self.fc2(gelu(self.fc1(self.norm(x))))


class Attention(nnx.Module):
    """Self-attention within windows, with a learned bias per head and absolute offset.

    The last windows of a row may reach beyond the map, where PyTorch computes tokens that are zero
    before the norm. Here their queries, which nobody reads, do not exist, and their keys, which are
    all the same, are one key with a bias that counts them.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.attention_biases = nnx.Param(jnp.zeros((num_heads, window_size**2)))
        self.num_heads, self.window_size = num_heads, window_size

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Of rows of windows, the last of which may reach beyond the map's right edge."""
        return attend_in_windows(self.norm(x), self.window_size, self.qkv, self._attend, self.proj)

    def _attend(self, qkv: Float[Array, "w n c3"], columns: int) -> Float[Array, "w n c"]:
        heads, dim = self.num_heads, qkv.shape[-1] // 3
        qkv = qkv.reshape(*qkv.shape[:2], heads, 3, dim // heads)
        q, k, v = (qkv[:, :, :, i].swapaxes(1, 2) for i in range(3))  # [W, heads, N, C / heads]
        q = q * q.shape[-1] ** -0.5
        bias, bias_beyond = self._bias(columns)
        scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32) + bias
        most = scores.max(axis=-1, keepdims=True)
        if bias_beyond is not None:
            beyond = self.qkv(self.norm(jnp.zeros((1, dim), q.dtype)))
            key, value = jnp.moveaxis(beyond.reshape(1, heads, 3, -1), 2, 0)[1:, 0, :, None]
            score = (q * key).sum(axis=-1, keepdims=True, dtype=jnp.float32) + bias_beyond
            most = jnp.maximum(most, score)
        weights = jnp.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.matmul(weights.astype(v.dtype), v)
        if bias_beyond is not None:
            weight = jnp.exp(score - most)
            out, total = out + weight.astype(v.dtype) * value, total + weight
        out = out / total.astype(v.dtype)
        return out.swapaxes(1, 2).reshape(*qkv.shape[:2], dim)

    def _bias(
        self, columns: int
    ) -> tuple[Float[Array, "heads n n"], Float[Array, "heads n 1"] | None]:
        """Of the keys in the first columns of a window, and of all beyond them together."""
        size = self.window_size
        row, column = np.divmod(np.arange(size**2), size)
        offset = np.abs(row[:, None] - row) * size + np.abs(column[:, None] - column)
        inside = column < columns
        bias = self.attention_biases[...][:, offset[inside]]
        if inside.all():
            return bias, None
        return bias[..., inside], jax.nn.logsumexp(bias[..., ~inside], axis=-1, keepdims=True)


class TinyViTBlock(nnx.Module):
    """Window attention, depthwise convolution, MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.attn = Attention(dim, num_heads, window_size, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dtype=dtype, rngs=rngs)
        self.local_conv = Conv2dBN(dim, dim, 3, groups=dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = map_window_rows(lambda x: x + self.attn(x), x, self.attn.window_size, _WINDOW_BYTES)
        x = self.local_conv(x)
        strips = split_rows(x, max(_MLP_TOKENS // x.shape[2], 1))
        return join_rows(map_strips(lambda x: x + self.mlp(x), strips))


class Stage(nnx.Module):
    """`ConvLayer` (stage 0) or `BasicLayer` of the PyTorch file: blocks, then patch merging."""

    def __init__(self, config: TinyViTConfig, index: int, *, dtype, rngs: nnx.Rngs):
        dim = config.embed_dims[index]

        def block():
            if index == 0:
                return MBConv(dim, config.mbconv_expand_ratio, dtype=dtype, rngs=rngs)
            return TinyViTBlock(
                dim,
                config.num_heads[index],
                config.window_sizes[index],
                config.mlp_ratio,
                dtype=dtype,
                rngs=rngs,
            )

        self.blocks = nnx.List([block() for _ in range(config.depths[index])])
        if index < len(config.strides):
            out_dim, stride = config.embed_dims[index + 1], config.strides[index]
            self.downsample = PatchMerging(dim, out_dim, stride, dtype=dtype, rngs=rngs)
        else:
            self.downsample = None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nnx.Module):
    """Image encoder: [B, S, S, 3] normalised pixels to [B, S / 4, S / 4, out_chans]."""

    def __init__(self, config: TinyViTConfig, out_chans: int, *, dtype=None, rngs: nnx.Rngs):
        dim, stride = config.embed_dims[0], config.patch_embed_stride
        self.patch_embed = PatchEmbed(dim, stride, dtype=dtype, rngs=rngs)
        stages = range(len(config.depths))
        self.layers = nnx.List([Stage(config, i, dtype=dtype, rngs=rngs) for i in stages])
        self.neck = neck(config.embed_dims[-1], out_chans, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b h w c"]:
        return map_images(self.encode_batch, x)

    def encode_batch(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b h w c"]:
        """As `__call__`, all images at once and in the form of the moment (`ops.strips.on_cpu`)."""
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)
