"""LayerNorm over channels, with two-pass statistics in float32 as in PyTorch."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.form import Form


def layer_norm(
    x: Float[Array, "... c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float,
    form: Form,
) -> Float[Array, "... c"]:
    """Normalises over the last axis; the result has the type of `x`. Plain form: the first lines.

    The CPU's form defines its own gradient. jax's gradient is a chain of small reductions, each of
    which XLA:CPU runs as a library kernel. Here sums over pixels are products with a row of ones.
    """
    if not form.cpu:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(x.dtype)
    # One shape is used throughout: XLA:CPU computes a value twice if it is needed in two shapes.
    return _norm_rows(x.reshape(-1, x.shape[-1]), scale, bias, epsilon).reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_rows(
    x: Float[Array, "n c"], scale: Float[Array, " c"], bias: Float[Array, " c"], epsilon: float
) -> Float[Array, "n c"]:
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    inverse_std = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    # This changes no value. It prevents XLA:CPU from writing the inverse standard deviation once
    # per channel.
    inverse_std = jax.lax.reduce_precision(inverse_std, exponent_bits=8, mantissa_bits=23)
    y = (centred * (inverse_std * scale) + bias).astype(x.dtype)
    return y, (x, mean, inverse_std, scale, bias)


def _backward(epsilon, saved, gradient):
    x, mean, inverse_std, scale, bias = saved
    gradient = gradient.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse_std
    product = gradient * normal
    weights = scale.astype(jnp.float32)[:, None] / len(scale)
    along = jnp.matmul(product, weights, precision="highest")  # mean over the channels
    level = jnp.matmul(gradient, weights, precision="highest")
    by_x = inverse_std * (gradient * scale - level - normal * along)
    by_scale = _sum_of_rows(product).astype(scale.dtype)
    return by_x.astype(x.dtype), by_scale, _sum_of_rows(gradient).astype(bias.dtype)


_norm_rows.defvjp(_forward, _backward)


def _sum_of_rows(x: Float[Array, "n c"]) -> Float[Array, " c"]:
    return jnp.matmul(jnp.ones((1, len(x))), x, precision="highest")[0]
