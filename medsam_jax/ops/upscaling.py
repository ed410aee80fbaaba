"""Last step of the mask decoder: upscaling by 4, then a product with one vector per mask."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.form import Form


def upscaled_masks(
    output_upscaling: Callable[[Array], Array],
    src: Float[Array, "b p h w c"],
    hyper_in: Float[Array, "b p m c8"],
    form: Form,
) -> Float[Array, "b p m h4 w4"]:
    """Returns mask logits from `MaskDecoder.output_upscaling`. Plain form: the first line.

    In the CPU's form, pixels stay rows of channels, in the order of the outputs of the two
    transposed 2 x 2 convolutions. They are reordered once, in the final masks. One shape is used
    throughout, because XLA:CPU computes a value twice if it is needed in two shapes.
    """
    if not form.cpu:
        return jnp.einsum("bpmc,bpyxc->bpmyx", hyper_in, output_upscaling(src))
    batch, prompts, height, width, channels = src.shape
    first, norm, activation, second, _ = output_upscaling.layers
    pixels = first.blocks(src.reshape(-1, channels))  # [B * P * N, 4, C / 4]
    pixels = second.blocks(activation(norm(pixels.reshape(-1, pixels.shape[-1]))))
    upscaled = activation(pixels.reshape(batch, prompts, -1, pixels.shape[-1]))
    masks = upscaled @ hyper_in.swapaxes(-1, -2)  # [B, P, N * 16, M]
    masks = masks.reshape(batch, prompts, height, width, 2, 2, 2, 2, -1)
    masks = masks.transpose(0, 1, 8, 2, 4, 6, 3, 5, 7)  # [B, P, M, h, 2, 2, w, 2, 2]
    return masks.reshape(batch, prompts, -1, 4 * height, 4 * width)
