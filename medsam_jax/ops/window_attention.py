"""Self-attention within windows of a few tokens, with a bias for each pair of tokens.

The scores of all windows together are several times the feature map. The kernels for TPUs and GPUs
hold those of a window in fast memory: queries, keys and values are read once, and the result is
written once.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medsam_jax.ops.form import AnyMesh, Form
from medsam_jax.ops.kernels import run_kernel


def window_attention(
    qkv: Float[Array, "w n heads 3 d"], biases: Float[Array, "heads n n"], form: Form
) -> Float[Array, "w n heads d"]:
    """Softmax attention between the tokens of each window. Plain form: `_attend`.

    The score of a query and a key is `d ** -0.5 * q.k + bias`; the softmax is in float32.
    """
    if form.device != "accelerator" or not form.kernels:
        return _attend(qkv, biases)
    return _in_kernel(form.mesh, qkv, biases)


def _attend(qkv: Array, biases: Array) -> Array:
    q, k, v = (qkv[:, :, :, i].swapaxes(1, 2) for i in range(3))  # [W, heads, N, D]
    q, k = q * q.shape[-1] ** -0.5, k.swapaxes(2, 3)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) + biases
    most = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))  # cancels out
    weights = jnp.exp(scores - most)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v) / total.astype(v.dtype)
    return out.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_kernel(mesh: AnyMesh, qkv: Array, biases: Array) -> Array:
    from medsam_jax.ops import window_tpu, window_triton  # Pallas is slow to import

    kernels = {"tpu": window_tpu.forward, "cuda": window_triton.forward, "default": _attend}
    return run_kernel(kernels, mesh, qkv, shared=(biases,))


def _forward(mesh: AnyMesh, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _in_kernel(mesh, *inputs), inputs


def _backward(mesh: AnyMesh, saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(_attend, *saved)[1](gradient)


_in_kernel.defvjp(_forward, _backward)
