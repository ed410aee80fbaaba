"""Layers shared by the models.

Arrays are NHWC. Variable paths, joined by dots, equal the paths of the PyTorch `state_dict`, except
that the last part has Flax's name (`kernel`, `scale`, `embedding`, `mean`, `var`). A checkpoint is
therefore converted by renaming and transposing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medsam_jax.ops.activation import dense_gelu, gelu
from medsam_jax.ops.convolution import conv3x3, convolution, depthwise_conv3x3
from medsam_jax.ops.form import PLAIN, Form
from medsam_jax.ops.layer_norm import layer_norm


class Buffer(nnx.Variable):
    """Array of the checkpoint that is never trained (PyTorch's `register_buffer`)."""


class Derived(nnx.Variable):
    """Array computed from other arrays of the module; neither trained nor saved."""


class Sequential(nnx.Module):
    """Applies layers in order; layer `i`, perhaps a plain function, is attribute `str(i)`."""

    def __init__(self, *layers: Callable[[Array], Array]):
        self.length = len(layers)
        for index, layer in enumerate(layers):
            setattr(self, str(index), layer)

    @property
    def layers(self) -> list[Callable[[Array], Array]]:
        return [getattr(self, str(index)) for index in range(self.length)]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over channels, with two-pass statistics in float32 as in PyTorch."""

    form = PLAIN

    def __init__(self, features: int, *, epsilon: float, dtype=None, rngs: nnx.Rngs):
        super().__init__(features, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        x = x.astype(self.dtype or x.dtype)
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon, self.form)


class LayerNorm2d(LayerNorm):
    """SAM's LayerNorm2d, over the channels of a feature map: epsilon 1e-6."""

    def __init__(self, features: int, *, dtype=None, rngs: nnx.Rngs):
        super().__init__(features, epsilon=1e-6, dtype=dtype, rngs=rngs)


class NeckConv(nnx.Conv):
    """1x1 or 3x3 convolution of stride 1, padded to keep the size, without bias."""

    form = PLAIN

    def __init__(self, features: int, out_features: int, side: int, *, dtype, rngs: nnx.Rngs):
        kw = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        super().__init__(features, out_features, (side, side), **kw)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        dtype = self.dtype or x.dtype
        x, kernel = x.astype(dtype), self.kernel[...].astype(dtype)
        return x @ kernel[0, 0] if self.kernel_size == (1, 1) else conv3x3(x, kernel, self.form)


def neck(features: int, out_features: int, *, dtype, rngs: nnx.Rngs) -> Sequential:
    """Returns the layers after the blocks of an image encoder, ViT or TinyViT."""
    kw = {"dtype": dtype, "rngs": rngs}
    return Sequential(
        NeckConv(features, out_features, 1, **kw),
        LayerNorm2d(out_features, **kw),
        NeckConv(out_features, out_features, 3, **kw),
        LayerNorm2d(out_features, **kw),
    )


def linear_gelu(
    linear: nnx.Linear, x: Float[Array, "b *n i"], form: Form
) -> Float[Array, "b *n o"]:
    """Returns `gelu(linear(x))`."""
    dtype = linear.dtype or x.dtype
    kernel, bias = linear.kernel[...].astype(dtype), linear.bias[...].astype(dtype)
    return dense_gelu(x.astype(dtype), kernel, bias, form)


class MLPBlock(nnx.Module):
    """Two linear layers with an activation between (segment_anything/modeling/common.py)."""

    form = PLAIN

    def __init__(
        self,
        embedding_dim: int,
        mlp_dim: int,
        act: Callable[[Array], Array] = gelu,
        *,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.lin1 = nnx.Linear(embedding_dim, mlp_dim, dtype=dtype, rngs=rngs)
        self.lin2 = nnx.Linear(mlp_dim, embedding_dim, dtype=dtype, rngs=rngs)
        self.act = act

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Returns `lin2(act(lin1(x)))`."""
        if self.act is not gelu:
            return self.lin2(self.act(self.lin1(x)))
        return self.lin2(linear_gelu(self.lin1, x, self.form))


class BatchNorm(nnx.Module):
    """BatchNorm that always applies its stored statistics (PyTorch's `eval()`), epsilon 1e-5.

    `mean` and `var` never change, so the layer is a scale and a shift. Fine-tuning uses small
    batches of one modality, for which batch statistics are worse than the pre-trained ones.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.mean = nnx.BatchStat(jnp.zeros((features,)))
        self.var = nnx.BatchStat(jnp.ones((features,)))

    def scale_and_shift(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
        return scale, self.bias[...] - self.mean[...] * scale


class Conv2dBN(nnx.Module):
    """Convolution without bias, then BatchNorm (tiny_vit_sam.py `Conv2d_BN`), as one operation.

    Each call folds the norm's scale into the kernel; the parameters stay separate and trainable.
    """

    form = PLAIN

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        if kernel_size not in (1, 3) or groups not in (1, in_features):
            raise ValueError(f"kernel {kernel_size} with {groups} groups is not implemented")
        kw = {"feature_group_count": groups, "use_bias": False, "rngs": rngs}
        self.c = nnx.Conv(in_features, out_features, (kernel_size, kernel_size), **kw)
        self.bn = BatchNorm(out_features, rngs=rngs)
        self.kernel_size, self.stride, self.groups, self.dtype = kernel_size, stride, groups, dtype

    def folded(self, dtype) -> tuple[Float[Array, "kh kw i d"], Float[Array, " d"]]:
        """Returns kernel [kh, kw, c / groups, d] and bias of the equivalent single convolution."""
        if self.form.folded:
            return self.c.kernel[...], self.bn.bias[...]
        scale, shift = self.bn.scale_and_shift()
        return (self.c.kernel[...] * scale).astype(dtype), shift.astype(dtype)

    def fold(self) -> None:
        """Replaces kernel and norm's bias by those of the equivalent single convolution."""
        kernel, bias = self.folded(self.dtype or self.c.kernel.dtype)
        self.c.kernel.set_value(kernel)
        self.bn.bias.set_value(bias)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        dtype = self.dtype or x.dtype
        kernel, bias = self.folded(dtype)
        x = x.astype(dtype)
        if self.groups > 1:
            x = depthwise_conv3x3(x, kernel, self.stride, self.form)
        elif self.kernel_size == 1:
            x = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        else:
            x = convolution(x, kernel, self.stride)
        return x + bias


class ConvTranspose2x2(nnx.Module):
    """`torch.nn.ConvTranspose2d(kernel_size=2, stride=2)` as a matrix product and a reordering.

    The kernel is stored as [2, 2, out, in], Flax's layout for `transpose_kernel=True`.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype=None, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,)))
        self.dtype = dtype

    def fold(self) -> None:
        """Converts the parameters to the compute dtype."""
        for parameter in (self.kernel, self.bias):
            parameter.set_value(parameter[...].astype(self.dtype or parameter.dtype))

    def __call__(self, x: Float[Array, "... h w c"]) -> Float[Array, "... 2*h 2*w d"]:
        height, width = x.shape[-3:-1]
        x = self.blocks(x)  # [..., h, w, 4, d]
        x = x.reshape(*x.shape[:-2], 2, 2, x.shape[-1]).swapaxes(-3, -4)
        return x.reshape(*x.shape[:-5], 2 * height, 2 * width, x.shape[-1])

    def blocks(self, x: Float[Array, "... i"]) -> Float[Array, "... 4 o"]:
        """Returns the four output pixels (row by row) of each input pixel, before reordering."""
        dtype = self.dtype or x.dtype
        kernel = self.kernel[...].astype(dtype)  # [2, 2, o, i]
        product = x.astype(dtype) @ kernel.reshape(-1, kernel.shape[-1]).T
        bias = self.bias[...].astype(dtype)
        return product.reshape(*x.shape[:-1], 4, bias.size) + bias
