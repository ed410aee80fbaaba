"""TinyViT image encoder of LiteMedSAM (tiny_vit_sam.py): 256 x 256 x 3 to 64 x 64 x 256.

Differences from the PyTorch file: arrays are NHWC, BatchNorm is folded into its convolution, and
there is no stochastic depth, whose rate is 0 in LiteMedSAM.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from medsam_jax.models.common import Conv2dBN, LayerNorm, Sequential, linear_gelu, neck
from medsam_jax.ops.activation import gelu
from medsam_jax.ops.convolution import inverted_bottleneck
from medsam_jax.ops.form import PLAIN
from medsam_jax.ops.strips import token_wise
from medsam_jax.ops.window_attention import window_attention
from medsam_jax.ops.windows import attend_in_windows


@dataclasses.dataclass(frozen=True)
class TinyViTConfig:
    """Sizes of a TinyViT; the defaults are LiteMedSAM's."""

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)  # stage 0 has no attention
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    strides: tuple[int, ...] = (2, 2, 1)  # of patch merging after stages 0, 1, 2
    patch_embed_stride: int = 1  # of each of its two convolutions; MobileSAM: 2 with 3x3 kernels
    mlp_ratio: float = 4.0
    mbconv_expand_ratio: float = 4.0

    @property
    def patch_size(self) -> int:
        """Input pixels per embedding pixel."""
        return int(np.prod(self.strides)) * self.patch_embed_stride**2


class PatchEmbed(nnx.Module):
    """Two convolutions from pixels to channels: 1x1 for stride 1 (LiteMedSAM), else 3x3."""

    def __init__(self, embed_dim: int, stride: int, *, dtype, rngs: nnx.Rngs):
        kernel_size = 1 if stride == 1 else 3
        self.seq = Sequential(
            Conv2dBN(3, embed_dim // 2, kernel_size, stride, dtype=dtype, rngs=rngs),
            gelu,
            Conv2dBN(embed_dim // 2, embed_dim, kernel_size, stride, dtype=dtype, rngs=rngs),
        )

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        return self.seq(x)


class MBConv(nnx.Module):
    """Inverted bottleneck: expand, depthwise 3x3, project, add."""

    form = PLAIN

    def __init__(self, dim: int, expand_ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = int(dim * expand_ratio)
        self.conv1 = Conv2dBN(dim, hidden, dtype=dtype, rngs=rngs)
        self.conv2 = Conv2dBN(hidden, hidden, 3, groups=hidden, dtype=dtype, rngs=rngs)
        self.conv3 = Conv2dBN(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns `gelu(conv3(gelu(conv2(gelu(conv1(x))))) + x)`."""
        return inverted_bottleneck(
            x, self.conv1, self.conv2, lambda hidden, x: gelu(self.conv3(hidden) + x), self.form
        )


class PatchMerging(nnx.Module):
    """Inverted bottleneck to `out_dim` channels, on a grid coarser by `stride`."""

    form = PLAIN

    def __init__(self, dim: int, out_dim: int, stride: int, *, dtype, rngs: nnx.Rngs):
        self.conv1 = Conv2dBN(dim, out_dim, dtype=dtype, rngs=rngs)
        self.conv2 = Conv2dBN(out_dim, out_dim, 3, stride, out_dim, dtype=dtype, rngs=rngs)
        self.conv3 = Conv2dBN(out_dim, out_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Returns `conv3(gelu(conv2(gelu(conv1(x)))))`."""
        return inverted_bottleneck(
            x, self.conv1, self.conv2, lambda hidden, _: self.conv3(hidden), self.form
        )


class Mlp(nnx.Module):
    form = PLAIN

    def __init__(self, dim: int, hidden_dim: int, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Returns `fc2(gelu(fc1(norm(x))))`."""
        return self.fc2(linear_gelu(self.fc1, self.norm(x), self.form))


class Attention(nnx.Module):
    """Self-attention within a window, with a learned bias per head and absolute offset."""

    form = PLAIN

    def __init__(self, dim: int, num_heads: int, window_size: int, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.attention_biases = nnx.Param(jnp.zeros((num_heads, window_size**2)))
        self.num_heads, self.window_size = num_heads, window_size

    def __call__(self, x: Float[Array, "n y x c"]) -> Float[Array, "n y x c"]:
        """Applies attention within each of n windows."""
        windows, dim = len(x), x.shape[-1]
        # A list of tokens: the gradient of a kernel over more axes is slower on a CPU.
        qkv = self.qkv(self.norm(x.reshape(-1, dim)))
        qkv = qkv.reshape(windows, -1, self.num_heads, 3, dim // self.num_heads)
        out = window_attention(qkv, self.biases(), self.form)  # [W, N, heads, D]
        return self.proj(out.reshape(-1, dim)).reshape(x.shape)

    def biases(self) -> Float[Array, "heads n n"]:
        """Returns the bias of each head by query and key."""
        if self.form.folded:
            return self.attention_biases[...]
        row, column = np.divmod(np.arange(self.window_size**2), self.window_size)
        rows, columns = np.abs(row[:, None] - row), np.abs(column[:, None] - column)
        return self.attention_biases[...][:, rows * self.window_size + columns]

    def fold(self) -> None:
        """Replaces the biases by offset with those by query and key."""
        self.attention_biases.set_value(self.biases())


class TinyViTBlock(nnx.Module):
    """Window attention, depthwise convolution, MLP."""

    form = PLAIN

    def __init__(
        self, dim: int, num_heads: int, window_size: int, mlp_ratio: float, *, dtype, rngs: nnx.Rngs
    ):
        self.attn = Attention(dim, num_heads, window_size, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dtype=dtype, rngs=rngs)
        self.local_conv = Conv2dBN(dim, dim, 3, groups=dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x + attend_in_windows(self.attn, x, self.attn.window_size, self.form)
        x = self.local_conv(x)
        return token_wise(lambda x: x + self.mlp(x), x, self.form)


class Stage(nnx.Module):
    """`ConvLayer` (stage 0) or `BasicLayer` of the PyTorch file: blocks, then patch merging."""

    def __init__(self, config: TinyViTConfig, index: int, *, dtype, rngs: nnx.Rngs):
        dim, kw = config.embed_dims[index], {"dtype": dtype, "rngs": rngs}
        heads, window = config.num_heads[index], config.window_sizes[index]

        def block():
            if index == 0:
                return MBConv(dim, config.mbconv_expand_ratio, **kw)
            return TinyViTBlock(dim, heads, window, config.mlp_ratio, **kw)

        self.blocks = nnx.List([block() for _ in range(config.depths[index])])
        if index < len(config.strides):
            out_dim, stride = config.embed_dims[index + 1], config.strides[index]
            self.downsample = PatchMerging(dim, out_dim, stride, **kw)
        else:
            self.downsample = None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nnx.Module):
    """Image encoder: [B, S, S, 3] normalised pixels to [B, S / 4, S / 4, out_chans]."""

    def __init__(
        self, config: TinyViTConfig, image_size: int, out_chans: int, *, dtype=None, rngs: nnx.Rngs
    ):
        if image_size % config.patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of {config.patch_size}")
        kw = {"dtype": dtype, "rngs": rngs}
        self.patch_embed = PatchEmbed(config.embed_dims[0], config.patch_embed_stride, **kw)
        self.layers = nnx.List([Stage(config, i, **kw) for i in range(len(config.depths))])
        self.neck = neck(config.embed_dims[-1], out_chans, **kw)

    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b h w c"]:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)
